// Rows of numbers to bit planes, by thresholds or by uniform quantisation.
//
// A warp takes a row at a time. Each lane reads eight neighbouring values, 16 bytes at a time where
// everything is aligned, and makes eight codes of them, one to a byte. Transposed as a matrix of
// 8 x 8 bits that is a byte for each plane; transposed again as a matrix of 4 x 4 bytes over four
// lanes, a word of 32 neighbouring bits for each plane.
#pragma once

#include "args/pack_bits.h"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kPackWarps = 8;     // rows of a block
constexpr int kPackInFlight = 3;  // loads before the first use; 768 values are three

// Eight bytes in a 64-bit number as an 8 x 8 matrix of bits, transposed: afterwards byte p holds
// bit p of every byte.
__device__ __forceinline__ uint64_t transpose_bits_8x8(uint64_t x) {
  const auto swap = [&x](int distance, uint64_t lower) {
    const uint64_t moved = (x ^ x >> distance) & lower;
    x ^= moved ^ moved << distance;
  };
  swap(7, 0x00aa00aa00aa00aaull);
  swap(14, 0x0000cccc0000ccccull);
  swap(28, 0x00000000f0f0f0f0ull);
  return x;
}

// Four bytes in each of four neighbouring lanes as a 4 x 4 matrix of bytes, transposed: afterwards
// lane t holds byte t of every lane. `t` is the caller's place among the four.
__device__ __forceinline__ uint32_t transpose_bytes_4x4(uint32_t x, int t) {
  const uint32_t beside = __shfl_xor_sync(0xffffffffu, x, 1);
  x = __byte_perm(x, beside, t & 1 ? 0x3715 : 0x6240);
  const uint32_t across = __shfl_xor_sync(0xffffffffu, x, 2);
  return __byte_perm(x, across, t & 2 ? 0x3276 : 0x5410);
}

// Eight values of a row, `inside` of them within it; the others are never looked at.
template <typename T, bool kWhole>
__device__ __forceinline__ Eight<T> load_eight(const T* from, int inside) {
  Eight<T> eight{};
  if (kWhole) {
    if (inside > 0) eight.load(from);
  } else {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      if (i < inside) eight.pieces[i / Eight<T>::kPerLoad].values[i % Eight<T>::kPerLoad] = from[i];
    }
  }
  return eight;
}

// Calls body(piece, values, how many of them are real) for all pieces of 256 values of a row, eight
// values a lane, with several loads under way at once.
template <typename T, bool kWhole, typename Body>
__device__ __forceinline__ void for_pieces(const T* x, int width, int lane, Body body) {
  constexpr int kInFlight = kWhole ? kPackInFlight : 1;
  const int pieces = (width + 255) / 256;
  for (int first = 0; first < pieces; first += kInFlight) {
    Eight<T> held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = ((first + i) * 32 + lane) * kEight;
      held[i] = load_eight<T, kWhole>(x + at, width - at);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < pieces) {
        body(first + i, held[i], width - ((first + i) * 32 + lane) * kEight);
      }
    }
  }
}

// Writes the planes of one row, and sums its codes.
struct PlaneWriter {
  uint32_t* words;  // of the row, in plane 0
  int64_t plane;    // words from one plane to the next
  int planes;
  int row_words;
  int lane;
  int sum = 0;

  // `codes`: the lane's eight codes of a piece, one to a byte. All lanes of the warp call this.
  __device__ __forceinline__ void add(int piece, uint64_t codes) {
    const uint64_t bytes = transpose_bits_8x8(codes);
    const int t = lane % 4, word = piece * 8 + lane / 4;
#pragma unroll
    for (int first = 0; first < 8; first += 4) {
      if (first >= planes) break;
      const auto four = static_cast<uint32_t>(bytes >> 8 * first);
      const uint32_t bits = transpose_bytes_4x4(four, t);
      if (first + t < planes && word < row_words) {
        words[(first + t) * plane + word] = bits;
        sum += __popc(bits) << (first + t);
      }
    }
  }

  __device__ __forceinline__ void write_sum(int32_t* to) {
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (lane == 0) *to = sum;
  }
};

// How a value compares with its threshold. A NaN lies below everything.
__device__ __forceinline__ int compared(float x, float threshold, Ties ties) {
  const int above = x > threshold, reached = x >= threshold;
  return ties == Ties::kBelow ? above : ties == Ties::kAbove ? reached : above + reached;
}

// 1 / scale, or 0 where that is no number: for a scale of 0, or too small to have a reciprocal.
__device__ __forceinline__ float reciprocal_or_zero(float scale) {
  constexpr float kLargest = 3.40282347e+38f;
  const float reciprocal = 1.0f / scale;
  return fabsf(reciprocal) <= kLargest ? reciprocal : 0.0f;
}

// Uniform quantisation of one row: the code of x is that of the nearest level, ties to even.
struct Quantiser {
  float inverse;
  float low, high;

  __device__ __forceinline__ Quantiser(float scale, const PackBitsArgs& args)
      : inverse(reciprocal_or_zero(scale)),
        low(static_cast<float>(args.low)),
        high(static_cast<float>(args.low + (1 << args.bits) - 1)) {}

  __device__ __forceinline__ int operator()(float x) const {
    float level = round_even(multiply_rn(x, inverse));
    if (level != level) level = 0.0f;
    return static_cast<int>(fminf(fmaxf(level, low), high) - low);
  }
};

__device__ __forceinline__ float max_over_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// The scale that the largest finite magnitude of a row asks for.
template <typename T, bool kWhole>
__device__ __forceinline__ float scale_of_row(const T* x, int width, int lane, int bits) {
  float largest = 0.0f;
  for_pieces<T, kWhole>(x, width, lane, [&](int, const Eight<T>& values, int inside) {
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
      const float size = fabsf(values[i]);
      if (i < inside && size < INFINITY) largest = fmaxf(largest, size);
    }
  });
  return max_over_warp(largest) / static_cast<float>((1 << (bits - 1)) - 1);
}

template <typename T, bool kWhole, bool kCodes>
__global__ void __launch_bounds__(32 * kPackWarps)
    pack_bits_kernel(const __grid_constant__ PackBitsArgs args) {
  const int lane = threadIdx.x % 32, width = static_cast<int>(args.width);
  const int row_words = (width + 31) / 32;
  const int64_t warps = int64_t{gridDim.x} * kPackWarps;
  for (int64_t row = blockIdx.x * kPackWarps + threadIdx.x / 32; row < args.rows; row += warps) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    PlaneWriter out{args.words + row * row_words, args.rows * row_words,
                    args.bits                   ? args.bits
                    : args.ties == Ties::kExact ? 2
                                                : 1,
                    row_words, lane};
    // Packs the codes of a piece, which code_of(i) gives for the lane's value number i.
    const auto add_piece = [&](int piece, int inside, auto code_of) {
      uint64_t codes = 0;
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if (i < inside) codes |= static_cast<uint64_t>(code_of(i)) << 8 * i;
      }
      out.add(piece, codes);
    };
    if (kCodes) {
      const float scale =
          args.scale ? args.scale[row] : scale_of_row<T, kWhole>(x, width, lane, args.bits);
      const Quantiser quantise(scale, args);
      for_pieces<T, kWhole>(x, width, lane, [&](int piece, const Eight<T>& values, int inside) {
        add_piece(piece, inside, [&](int i) { return quantise(values[i]); });
      });
      if (lane == 0) args.scale_out[row] = scale;
    } else {
      for_pieces<T, kWhole>(x, width, lane, [&](int piece, const Eight<T>& values, int inside) {
        Eight<float> threshold{};  // zeros, where there are none
        if (args.threshold) {
          threshold = load_eight<float, kWhole>(args.threshold + width - inside, inside);
        }
        add_piece(piece, inside,
                  [&](int i) { return compared(values[i], threshold[i], args.ties); });
      });
    }
    out.write_sum(args.sums + row);
  }
}

}  // namespace cuda
}  // namespace filbert
