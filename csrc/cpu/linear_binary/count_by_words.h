// Counting by words: the population counts of (row & weight), 32 inputs of an output in each lane.
// The fastest way where vectors have such an instruction, and for few rows everywhere.
#pragma once

#include "cpu/linear_binary/block.h"
#include "cpu/linear_binary/sparse_plane.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

// A register tile: 24 sums with the 32 registers of AVX-512, fewer where a count needs room.
constexpr int kRows = kLanes == 16 ? 6 : 2;
constexpr int kTileVectorsOfCounts = kLanes == 16 ? 4 : 2;

// Not inlined: within a larger function GCC keeps the sums in memory.
template <int kN>
__attribute__((noinline)) void count_rows_by_words(const Block& block, int64_t first_row, int plane,
                                                   int vector, int32_t* counts, bool first_plane) {
  constexpr int kV = kTileVectorsOfCounts;
  const uint32_t* weight[kV];
  for (int v = 0; v < kV; ++v) {
    const int lane = (vector + v) * kLanes;
    weight[v] = block.tile(lane / kTileOutputs) + lane % kTileOutputs;
  }
  const uint32_t* rows[kN];
  for (int r = 0; r < kN; ++r) rows[r] = block.row(first_row + r, plane);
  VecI acc[kN][kV];
#pragma GCC unroll 6
  for (int r = 0; r < kN; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) acc[r][v] = VecI{};
  }
  for (int64_t w = 0; w < block.args.row_words; ++w) {
    VecU bits[kV];
    for (int v = 0; v < kV; ++v) bits[v] = load(weight[v] + w * kTileWords);
#pragma GCC unroll 6
    for (int r = 0; r < kN; ++r) {
      const VecU row = broadcast(rows[r][w]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) acc[r][v] += popcount(row & bits[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kN; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      int32_t* at = counts + (first_row + r) * kColumns + (vector + v) * kLanes;
      store(at, first_plane ? acc[r][v] : 2 * load(at) + acc[r][v]);
    }
  }
}

void count_by_words(const Block& block, const SparsePlane& sparse, int32_t* counts) {
  for (int p = block.args.planes - 1; p >= 0; --p) {  // the highest first, doubled on the way
    const bool first = p == block.args.planes - 1;
    for (int64_t r = 0; r < block.rows;) {
      const int64_t left = block.rows - r;
      if (sparse.few(r, left >= kRows ? kRows : left, p)) {
        sparse.add(block, r, left >= kRows ? kRows : left, counts);
        r += left >= kRows ? kRows : left;
        continue;
      }
      for (int v = 0; v < kVectors; v += kTileVectorsOfCounts) {
        if (left >= kRows) {
          count_rows_by_words<kRows>(block, r, p, v, counts, first);
        } else if (left >= 2) {
          count_rows_by_words<2>(block, r, p, v, counts, first);
        } else {
          count_rows_by_words<1>(block, r, p, v, counts, first);
        }
      }
      r += left >= kRows ? kRows : left >= 2 ? 2 : 1;
    }
  }
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
