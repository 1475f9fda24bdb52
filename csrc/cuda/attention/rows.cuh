// Rows of Q, K and V on their way from global memory through shared memory to mma operands.
#pragma once

#include <cstdint>

#include "cuda/attn_varlen_plan.h"
#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

constexpr int kStrip = 16;  // query rows of one warp at a time; keys come in as many

// Rows of kDim 16-bit values in shared memory, cut into pieces of 16 bytes. Where a row's piece
// lies is permuted so that eight rows' worth of one piece touch all 32 banks once: ldmatrix reads
// columns of pieces, cp.async writes rows of them, and neither has conflicts.
template <int kDim>
struct SharedRows {
  static constexpr int kPieces = kDim / 8;
  static constexpr int kBytes = kDim * 2;  // of a row
  uint32_t base;

  __device__ __forceinline__ uint32_t at(int row, int piece) const {
    constexpr int kSpread = kPieces < 8 ? kPieces : 8;
    constexpr int kRowsPerLine = 8 / kSpread;  // rows that share 128 bytes
    return base + row * kBytes + (piece ^ (row / kRowsPerLine % kSpread)) * 16;
  }
  __device__ __forceinline__ SharedRows from(int row) const {  // row: a multiple of 8
    return {base + static_cast<uint32_t>(row * kBytes)};
  }
};

// A [rows, head, kDim] operand in global memory.
template <typename T>
struct GlobalRows {
  const T* base;
  int64_t row_stride;
  int dim;  // real columns; pieces past them are zeros

  __device__ __forceinline__ GlobalRows(const void* p, int64_t row, int64_t row_stride,
                                        int64_t head, int64_t head_stride, int64_t dim)
      : base(static_cast<const T*>(p) + row * row_stride + head * head_stride),
        row_stride(row_stride),
        dim(static_cast<int>(dim)) {}
};

__device__ __forceinline__ int rounded_up(int n, int to) { return (n + to - 1) / to * to; }

// Starts copying `rows` rows, and zeros up to the next multiple of 16 rows.
template <typename T, int kDim>
__device__ __forceinline__ void fetch_rows(SharedRows<kDim> to, const GlobalRows<T>& from,
                                           int rows) {
  constexpr int kPieces = SharedRows<kDim>::kPieces;
  // A thread stays in one column of pieces, and steps over so many rows that its permutation stays
  // the same too: two additions a piece.
  constexpr int kRows = static_cast<int>(kAttnThreads) / kPieces;
  static_assert(kRows % 8 == 0, "the permutation repeats every eight rows");
  const unsigned thread = thread_read_anew();
  int row = static_cast<int>(thread / kPieces);
  const int piece = static_cast<int>(thread % kPieces);
  const bool inside = piece * 8 < from.dim;
  uint32_t target = to.at(row, piece);
  const T* source = from.base + row * from.row_stride + piece * 8;
#pragma unroll 1
  for (const int end = rounded_up(rows, kStrip); row < end; row += kRows) {
    const bool valid = inside && row < rows;
    cp_async_16(target, valid ? source : from.base, valid);
    target += kRows * SharedRows<kDim>::kBytes;
    source += kRows * from.row_stride;
  }
}

// The same for up to kRows rows, and zeros for all others: unrolled, without a branch.
template <typename T, int kRows, int kDim>
__device__ __forceinline__ void fetch_block_rows(SharedRows<kDim> to, const GlobalRows<T>& from,
                                                 int rows) {
  constexpr int kPieces = SharedRows<kDim>::kPieces;
  constexpr int kTurn = static_cast<int>(kAttnThreads) / kPieces;
  static_assert(kTurn % 8 == 0, "the permutation repeats every eight rows");
  const unsigned thread = thread_read_anew();
  const int row = static_cast<int>(thread / kPieces);
  const int piece = static_cast<int>(thread % kPieces);
  const uint32_t target = to.at(row, piece);
  const T* source = from.base + row * from.row_stride + piece * 8;
  const int there = piece * 8 < from.dim ? rows - row : 0;
#pragma unroll
  for (int r = 0; r < kRows; r += kTurn) {
    cp_async_16(target + r * SharedRows<kDim>::kBytes, source, r < there);
    source += kTurn * from.row_stride;
  }
}

// One warp's view of the block.
struct Lane {
  int warp, id;
  int group;   // the fragment row this lane holds, and that row + 8
  int column;  // the first of the two fragment columns it holds

  __device__ __forceinline__ explicit Lane(unsigned thread = threadIdx.x)
      : warp(thread / 32), id(thread % 32), group(id / 4), column(id % 4 * 2) {}
};

// One warp starts copying up to 16 rows, and zeros for the others of 16.
template <typename T, int kDim>
__device__ __forceinline__ void fetch_strip(SharedRows<kDim> to, const GlobalRows<T>& from,
                                            int rows, const Lane& lane) {
  constexpr int kPieces = SharedRows<kDim>::kPieces, kTurn = 32 / kPieces;
  const int row = lane.id / kPieces, piece = lane.id % kPieces;
  const uint32_t target = to.at(row, piece);
  const T* source = from.base + row * from.row_stride + piece * 8;
  const int there = piece * 8 < from.dim ? rows - row : 0;
#pragma unroll
  for (int r = 0; r < kStrip; r += kTurn) {
    // `row` is less than kTurn, a power of two: the permutation of row + r is that of both, XORed.
    const uint32_t turned = target ^ static_cast<uint32_t>(kTurn < 8 ? r % 8 * 16 : 0);
    cp_async_16(turned + r * SharedRows<kDim>::kBytes, source, r < there);
    source += kTurn * from.row_stride;
  }
}

// The strip's rows of Q as operand A, 16 columns from `step * 16`.
template <int kDim>
__device__ __forceinline__ void load_queries(uint32_t (&a)[4], SharedRows<kDim> q, int row,
                                             int step, const Lane& lane) {
  ldmatrix_x4(a, q.at(row + lane.id % 16, 2 * step + lane.id / 16));
}

// 16 keys as operand B of scores: registers 0, 1 are the first eight keys, 2, 3 the others.
template <int kDim>
__device__ __forceinline__ void load_keys(uint32_t (&b)[4], SharedRows<kDim> k, int key, int step,
                                          const Lane& lane) {
  ldmatrix_x4(b, k.at(key + lane.id / 16 * 8 + lane.id % 8, 2 * step + lane.id / 8 % 2));
}

// 16 values, 16 columns from `step * 16`, as operand B of the output: registers 0, 1 are the first
// eight columns, 2, 3 the others.
template <int kDim>
__device__ __forceinline__ void load_values(uint32_t (&b)[4], SharedRows<kDim> v, int key, int step,
                                            const Lane& lane) {
  ldmatrix_x4_trans(b, v.at(key + lane.id % 16, 2 * step + lane.id / 16));
}

}  // namespace cuda
}  // namespace filbert
