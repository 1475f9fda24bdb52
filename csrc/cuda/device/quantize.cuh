// A row of numbers to 8-bit codes, as csrc/cpu/simd/quantize.h has it: the same operations, so the
// same codes.
#pragma once

#include "args/quantize_rows.h"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

struct RowScale {
  float scale;
  int32_t zero;
};

// The least and the largest of what a lane has seen, and of 0. NaNs and infinities show in `bad`,
// which costs a multiply-add, where comparing would cost two operations of a slower kind.
struct RowRange {
  float low = 0.0f, high = 0.0f;
  float zero = 0.0f;  // or NaN

  __device__ __forceinline__ void add(float v) {
    low = fminf(v, low);  // a NaN leaves it
    high = fmaxf(v, high);
    zero = fmaf(v, 0.0f, zero);
  }
  __device__ __forceinline__ bool bad() const { return zero != zero; }

  // The range of the whole warp's values, in every lane.
  __device__ __forceinline__ void over_warp() {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      low = fminf(__shfl_xor_sync(0xffffffffu, low, lanes), low);
      high = fmaxf(__shfl_xor_sync(0xffffffffu, high, lanes), high);
    }
    zero = __ballot_sync(0xffffffffu, bad()) != 0 ? NAN : 0.0f;
  }
};

__device__ __forceinline__ float inverse_of(float scale) {
  const float inverse = 1.0f / scale;
  return fabsf(inverse) < INFINITY ? inverse : 0.0f;
}

__device__ __forceinline__ RowScale scale_of(const RowRange& range) {
  if (range.bad()) return {NAN, 0};
  const float scale = range.high / 255.0f - range.low / 255.0f;
  const float zero = round_even(fminf(multiply_rn(-range.low, inverse_of(scale)), 255.0f));
  return {scale, static_cast<int32_t>(zero)};
}

// The code of v; `inverse` is inverse_of(by.scale).
__device__ __forceinline__ uint32_t code_of(float v, float inverse, const RowScale& by) {
  const float low = static_cast<float>(-by.zero);
  float level = multiply_rn(v, inverse);
  level = fmaxf(level, low);  // of a NaN low, as on the CPU
  level = fminf(level, low + 255.0f);
  return static_cast<uint32_t>(small_int(level) + by.zero);
}

// The codes of a row of results that several threads hold: their range is that of all of them.
struct RowCodes {
  uint8_t* codes;
  RowScale by;
  float inverse;

  // `first`: 0 in one of the threads, which writes what the codes stand for.
  __device__ __forceinline__ RowCodes(const QuantizedRows& out, int64_t row, RowRange range,
                                      unsigned first)
      : codes(out.codes + row * out.codes_row) {
    range.over_warp();
    by = scale_of(range);
    inverse = inverse_of(by.scale);
    if (first == 0) out.scale[row] = by.scale, out.zero[row] = by.zero;
  }
  __device__ __forceinline__ void write(int64_t at, float value) const {
    codes[at] = static_cast<uint8_t>(code_of(value, inverse, by));
  }
};

}  // namespace cuda
}  // namespace filbert
