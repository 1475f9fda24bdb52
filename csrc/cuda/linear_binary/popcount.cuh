// linear_binary by __popc on ordinary cores: for GPUs whose tensor cores do not multiply bits, for
// one or two rows, and for weights that lie at any address.
//
// A warp makes 32 neighbouring outputs, one a lane, of kRows rows. Lanes read the weight as it lies
// in memory, 16 words side by side; a word of a row is the same for all of them. __popc is the
// bound, an eighth as fast as the AND, so that loads need no shared memory to keep up with it.
#pragma once

#include "args/linear_binary.h"
#include "cuda/device/bit_rows.cuh"
#include "cuda/linear_binary/epilogue.cuh"
#include "cuda/linear_binary_plan.h"

namespace filbert {
namespace cuda {

template <int kRows>
__device__ __forceinline__ void write_popcounts(const LinearBinaryArgs& args, int first_row,
                                                int output, const int (&counts)[kRows], Bit) {
  const int64_t row_words = divided_up(args.outputs, 32), plane = args.rows * row_words;
  const bool two = planes_out(args) == 2;
  int limit[BitEdge::kCount];
#pragma unroll
  for (int number = 0; number < BitEdge::kCount; ++number) {
    const BitEdge edge(args, number);
    limit[number] = edge.limits ? edge.limit(args, output) : 0;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r;
    const RowTerm term(args, row);
    uint32_t upper = 0, lower = 0;
#pragma unroll
    for (int number = 0; number < BitEdge::kCount; ++number) {
      const BitEdge edge(args, number);
      if (!edge.limits) continue;
      const uint32_t reached = __ballot_sync(0xffffffffu, term.reaches(counts[r], limit[number]));
      if (edge.upper) upper |= edge.ones(reached);
      if (edge.lower) lower |= edge.ones(reached);
    }
    if (threadIdx.x % 32 == 0 && row < args.rows) {
      uint32_t* to = args.out_words + row * row_words + output / 32;
      to[0] = two ? code_plane(upper, lower, 0) : upper;
      if (two) to[plane] = code_plane(upper, lower, 1);
    }
  }
}

template <int kRows, typename T>
__device__ __forceinline__ void write_popcounts(const LinearBinaryArgs& args, int first_row,
                                                int output, const int (&counts)[kRows], T) {
  const NumberTerms<1> terms(args, output);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r;
    if (row >= args.rows || output >= args.outputs) continue;
    float value = terms(0, RowTerm(args, row)(counts[r]), row_scale(args, row));
    if (args.residual) {
      value += to_float(static_cast<const T*>(args.residual)[row * args.residual_row + output]);
    }
    static_cast<T*>(args.out)[row * args.outputs + output] = from_float<T>(value);
  }
}

template <int kRows, typename Out>
__global__ void __launch_bounds__(32 * kPopcountWarps)
    linear_popcount_kernel(const __grid_constant__ LinearBinaryArgs args) {
  const int across = divided_up(args.outputs, 32);
  const int64_t warp = int64_t{blockIdx.x} * kPopcountWarps + threadIdx.x / 32;
  const int first_row = static_cast<int>(warp / across * kRows);
  const int output = static_cast<int>(warp % across * 32 + threadIdx.x % 32);
  if (first_row >= args.rows) return;
  const int row_words = static_cast<int>(args.row_words);
  // Lanes past the last 16 outputs, and rows past the last, do again what the first ones do.
  const int64_t tiles = divided_up(args.outputs, static_cast<int>(kTileOutputs));
  const int64_t tile = output / kTileOutputs < tiles ? output / kTileOutputs : 0;
  const uint32_t* weight = args.weight + tile * row_words * kTileOutputs + output % kTileOutputs;
  const uint32_t* words[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r < args.rows ? first_row + r : first_row;
    words[r] = args.words + row * args.row_stride;
  }

  int counts[kRows] = {};
  for (int plane = args.planes - 1; plane >= 0; --plane) {
    const int64_t from = plane * args.plane_stride;
#pragma unroll
    for (int r = 0; r < kRows; ++r) counts[r] *= 2;
    // The lower of two planes has a one where a sign is 0, which float rows nearly never have.
    if (args.planes == 2 && plane == 0) {
      uint32_t ones = 0;
      for (int w = threadIdx.x % 32; w < row_words; w += 32) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) ones |= words[r][w];
      }
      if (__ballot_sync(0xffffffffu, ones != 0) == 0) break;
    }
#pragma unroll 4
    for (int w = 0; w < row_words; ++w) {
      const uint32_t b = weight[int64_t{w} * kTileOutputs];
#pragma unroll
      for (int r = 0; r < kRows; ++r) counts[r] += __popc(words[r][from + w] & b);
    }
  }
  write_popcounts<kRows>(args, first_row, output, counts, Out{});
}

}  // namespace cuda
}  // namespace filbert
