// Rows of numbers to rows of 8-bit codes: a warp for each row, which it reads from memory for the
// range and from L1 for the codes.
#pragma once

#include "args/quantize_rows.h"
#include "cuda/device/quantize.cuh"

namespace filbert {
namespace cuda {

constexpr int kQuantizeWarps = 4;

// kWhole: rows of x and of codes are aligned to 16 and 8 bytes, and their width is a multiple of 8.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(32 * kQuantizeWarps)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsArgs args) {
  constexpr int kStep = kWhole ? kEight : 1;
  const int lane = threadIdx.x % 32, width = static_cast<int>(args.width);
  const int64_t warps = int64_t{gridDim.x} * kQuantizeWarps;
  for (int64_t row = blockIdx.x * kQuantizeWarps + threadIdx.x / 32; row < args.rows;
       row += warps) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    uint8_t* codes = args.out.codes + row * args.out.codes_row;
    RowRange range;
    for (int at = lane * kStep; at < width; at += 32 * kStep) {
      if constexpr (kWhole) {
        Eight<T> values;
        values.load(x + at);
#pragma unroll
        for (int i = 0; i < kEight; ++i) range.add(values[i]);
      } else {
        range.add(to_float(x[at]));
      }
    }
    range.over_warp();
    RowScale by = scale_of(range);
    if (args.scale && by.scale == by.scale) by = {*args.scale, *args.zero};
    const float inverse = inverse_of(by.scale);
    for (int at = lane * kStep; at < width; at += 32 * kStep) {
      if constexpr (kWhole) {
        Eight<T> values;
        values.load(x + at);
        uint32_t words[2] = {};
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          words[i / 4] |= code_of(values[i], inverse, by) << (8 * (i % 4));
        }
        store_8(codes + at, uint2{words[0], words[1]});
      } else {
        codes[at] = static_cast<uint8_t>(code_of(to_float(x[at]), inverse, by));
      }
    }
    if (lane == 0) {
      args.out.scale[row] = by.scale;
      args.out.zero[row] = by.zero;
    }
  }
}

}  // namespace cuda
}  // namespace filbert
