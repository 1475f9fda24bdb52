// What linear_binary makes of its integer sums: numbers, or bits. Both kernels of it end here.
#pragma once

#include "args/linear_binary.h"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

// Instantiates a kernel whose outputs are bits, where others have the type of their numbers.
struct Bit {};

template <typename Out>
constexpr bool is_bit = false;
template <>
constexpr bool is_bit<Bit> = true;

// Of a row: P becomes signed(P) = step * (2 P - sum), and all that is missing to the dot product is
// the column's own low * total.
struct RowTerm {
  int factor, minus;

  __device__ __forceinline__ RowTerm(int factor, int minus) : factor(factor), minus(minus) {}

  __device__ __forceinline__ RowTerm(const LinearBinaryArgs& args, int row)
      : factor(2 * args.step), minus(row < args.rows ? args.step * args.sums[row] : 0) {}

  __device__ __forceinline__ int operator()(int count) const { return factor * count - minus; }

  // 1 where signed(P) >= limit, else 0: the sign of a difference, which goes into a word in one
  // shift.
  __device__ __forceinline__ uint32_t reaches(int count, int limit) const {
    return static_cast<uint32_t>(limit - 1 + minus - factor * count) >> 31;
  }
};

// More than any signed(P): with 65504 inputs of eight bits they stay below 2^27.
constexpr int kNeverReached = 1 << 28;

// One edge of the bits: a one from `limits` on or, `below`, before them. It belongs to the upper
// bit of an output or to the lower one, or to both.
struct BitEdge {
  const int32_t* limits;  // [N], or null: no such edge
  bool below, upper, lower;

  static constexpr int kCount = 4;
  // Edges that begin a plane come first.
  __device__ __forceinline__ BitEdge(const LinearBinaryArgs& args, int number)
      : limits(number == 0   ? args.threshold
               : number == 1 ? args.lower
               : number == 2 ? args.until
                             : args.lower_until),
        below(number >= 2),
        upper(number % 2 == 0),
        lower(number == 0 ? !args.lower : number % 2 == 1) {}

  // The smallest signed(P) on the upper side of the edge of output `n`. The column's term, of at
  // most 30 bits, is moved to this side of the comparison; where the difference is beyond what
  // signed(P) can be, it is cut off. Past the last output: never a one.
  __device__ __forceinline__ int limit(const LinearBinaryArgs& args, int n) const {
    return n < args.outputs ? limit(args, n, args.low * args.totals[n]) : limit(args, n, 0);
  }
  // The same where the column's term is known.
  __device__ __forceinline__ int limit(const LinearBinaryArgs& args, int n, int column) const {
    if (n >= args.outputs) return below ? -kNeverReached : kNeverReached;
    const int limit = subtract_saturated(limits[n], column);
    return limit < -kNeverReached ? -kNeverReached : limit > kNeverReached ? kNeverReached : limit;
  }

  // The ones of this edge, from those bits that have reached its limits.
  __device__ __forceinline__ uint32_t ones(uint32_t reached) const {
    return below ? ~reached : reached;
  }
};

// The planes of codes whose bits are `upper` and `lower`.
__device__ __forceinline__ uint32_t code_plane(uint32_t upper, uint32_t lower, int plane) {
  return plane ? upper & lower : upper ^ lower;
}

// The terms of kOutputs neighbouring outputs that are numbers.
template <int kOutputs>
struct NumberTerms {
  float alpha[kOutputs], bias[kOutputs];
  int column[kOutputs];  // low * total

  __device__ __forceinline__ NumberTerms(const LinearBinaryArgs& args, int first) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const bool inside = first + i < args.outputs;
      alpha[i] = inside ? args.alpha[first + i] : 0.0f;
      bias[i] = inside && args.bias ? args.bias[first + i] : 0.0f;
      column[i] = inside ? args.low * args.totals[first + i] : 0;
    }
  }

  __device__ __forceinline__ NumberTerms(const float (&alpha_)[kOutputs],
                                         const float (&bias_)[kOutputs],
                                         const int (&column_)[kOutputs]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      alpha[i] = alpha_[i], bias[i] = bias_[i], column[i] = column_[i];
    }
  }

  __device__ __forceinline__ float operator()(int i, int signed_count, float scale) const {
    const float dot = static_cast<float>(signed_count + column[i]);  // exact up to 2^24
    return fmaf(multiply_rn(dot, alpha[i]), scale, bias[i]);
  }
};

__device__ __forceinline__ float row_scale(const LinearBinaryArgs& args, int row) {
  return args.scale && row < args.rows ? args.scale[row] : 1.0f;
}

// Adds the residual to four neighbouring outputs of a row, and writes those that there are.
template <typename T>
struct NumberWriter {
  const LinearBinaryArgs& args;
  bool out_fours, residual_fours;

  __device__ __forceinline__ explicit NumberWriter(const LinearBinaryArgs& args)
      : args(args),
        out_fours(by_fours<T>(args.out, args.outputs)),
        residual_fours(by_fours<T>(args.residual, args.residual_row | args.outputs)) {}

  __device__ __forceinline__ void write(int row, int first, float (&values)[4]) const {
    if (row >= args.rows || first >= args.outputs) return;
    if (args.residual) {
      const T* from = static_cast<const T*>(args.residual) + row * args.residual_row + first;
      Four<T> four{};
      if (residual_fours) {
        four.load(from);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + i < args.outputs) four.values[i] = from[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] += to_float(four.values[i]);
    }
    T* to = static_cast<T*>(args.out) + row * args.outputs + first;
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.values[i] = from_float<T>(values[i]);
    if (out_fours) return four.store(to);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < args.outputs) to[i] = four.values[i];
    }
  }
};

// What the tile's outputs and rows add to its counts, at the start of shared memory: read from
// global memory once, while the first stage is on its way, and not by every warp for each of its
// fragments.
template <typename Tiling, bool kBits>
struct TileTerms {
  struct Row {
    int minus;    // step * sum
    float scale;  // of numbers
  };
  static constexpr int kBytes = (3 * Tiling::kOutputs + 2 * Tiling::kRows) * 4;
  static_assert(kBytes % 128 == 0, "stages lie behind");

  static __device__ __forceinline__ int* columns() {
    return reinterpret_cast<int*>(shared_memory());
  }
  static __device__ __forceinline__ float* alphas() {
    return reinterpret_cast<float*>(shared_memory()) + Tiling::kOutputs;
  }
  static __device__ __forceinline__ float* biases() { return alphas() + Tiling::kOutputs; }
  static __device__ __forceinline__ Row* rows() {
    return reinterpret_cast<Row*>(biases() + Tiling::kOutputs);
  }

  // Reads those of the tile that begins at `row` and `output`; 0 for what is not there.
  static __device__ __forceinline__ void load(const LinearBinaryArgs& args, int row, int output) {
    for (int i = threadIdx.x; i < Tiling::kOutputs; i += Tiling::kThreads) {
      const int n = output + i;
      const bool inside = n < args.outputs;
      columns()[i] = inside ? args.low * args.totals[n] : 0;
      if (kBits) continue;
      alphas()[i] = inside ? args.alpha[n] : 0.0f;
      biases()[i] = inside && args.bias ? args.bias[n] : 0.0f;
    }
    for (int i = threadIdx.x; i < Tiling::kRows; i += Tiling::kThreads) {
      const RowTerm term(args, row + i);
      rows()[i] = {term.minus, kBits ? 1.0f : row_scale(args, row + i)};
    }
  }

  // Four neighbouring values from number `i` on, a multiple of 4.
  template <typename T>
  static __device__ __forceinline__ void read(T (&to)[4], const T* from, int i) {
    struct alignas(16) Values {
      T four[4];
    };
    const Values values = *reinterpret_cast<const Values*>(from + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = values.four[j];
  }
};

}  // namespace cuda
}  // namespace filbert
