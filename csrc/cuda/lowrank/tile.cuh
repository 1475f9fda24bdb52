// Tiles of 16-bit values in shared memory, and the product of two of them.
#pragma once

#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

// Rows of kPieces times 16 bytes, a multiple of 8 pieces. A piece's place is XORed with the row, so
// that eight rows of one piece touch all banks.
template <int kPieces>
struct LowRankTile {
  static_assert(kPieces % 8 == 0, "a row is whole lines");
  uint32_t base;

  __device__ __forceinline__ uint32_t at(int row, int piece) const {
    return base + row * (kPieces * 16) + (piece ^ row % 8) * 16;
  }
};

// Starts copying kRows rows, `stride` elements apart; zeros for rows and pieces that are not there.
template <int kThreads, int kRows, int kPieces, typename T>
__device__ __forceinline__ void fetch(const LowRankTile<kPieces>& to, const T* from, int64_t stride,
                                      int rows, int pieces) {
  static_assert(kRows * kPieces % kThreads == 0, "all threads copy as much");
#pragma unroll 4
  for (int i = 0; i < kRows * kPieces / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / kPieces, piece = index % kPieces;
    cp_async_16(to.at(row, piece), from + row * stride + piece * 8, row < rows && piece < pieces);
  }
}

// sums[strip][tile] += A B^T of one warp: 16 rows of A for each strip from a_row on, 8 rows of B
// for each tile from b_row on, `steps` times 16 inner values, which A has from a_piece on.
template <typename T, int kStrips, int kTiles, int kPiecesA, int kPiecesB>
__device__ __forceinline__ void multiply(float (&sums)[kStrips][kTiles][4],
                                         const LowRankTile<kPiecesA>& a, int a_row,
                                         const LowRankTile<kPiecesB>& b, int b_row, int steps,
                                         int lane) {
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    uint32_t rows[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      ldmatrix_x4(rows[s], a.at(a_row + s * 16 + lane % 16, step * 2 + lane / 16));
    }
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      uint32_t columns[4];
      ldmatrix_x4(columns,
                  b.at(b_row + pair * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        mma_16816<T>(sums[s][pair * 2], rows[s], columns[0], columns[1]);
        mma_16816<T>(sums[s][pair * 2 + 1], rows[s], columns[2], columns[3]);
      }
    }
  }
}

// Rounds sums of a warp to a tile: rows from `row` on, columns from `column` on. change(sum,
// column, row) is what they become before that.
template <typename T, int kStrips, int kTiles, int kPieces, typename Change>
__device__ __forceinline__ void store(const float (&sums)[kStrips][kTiles][4],
                                      const LowRankTile<kPieces>& to, int row, int column, int lane,
                                      const Change& change) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int first = column + t * 8 + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + s * 16 + half * 8 + lane / 4;
        store_shared_4(to.at(r, first / 8) + lane % 4 * 4,
                       pack2<T>(change(sums[s][t][half * 2], first, r),
                                change(sums[s][t][half * 2 + 1], first + 1, r)));
      }
    }
  }
}

}  // namespace cuda
}  // namespace filbert
