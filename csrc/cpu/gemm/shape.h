// The block sizes of the shared product, as data, each with its reason.
//
// A packed weight lies in panels of 16 outputs, on every instruction set:
//
//            outputs 0..15     outputs 16..31
//   k = 0   |................|................|      panel p is [K][16], 64 bytes a step in
//   float32: k = 1   |................|................|      one AVX-512 vector, two of AVX2, four
//   of SSE.
//   ...      panel 0          panel 1                Panels follow each other in memory.
//
// A register tile is kTileRows rows by kTilePanels panels. Its sums stay in registers for a block
// of kBlockSteps inner steps, and are then added to a strip of sums in L1.
#pragma once

#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int kPanelCols = 16;
constexpr int kPanelVectors = kPanelCols / kLanes;

// Sums, a step of the panels and one spread element must fit the register file: 12 x 2 + 2 + 1 of
// 32 with AVX-512, 6 x 2 + 2 + 1 of 16 with AVX2, 2 x 4 + 4 + 1 of 16 with SSE. As many
// independent sums hide the latency of a multiply-add (4 or 5 cycles, two started in each).
#if FILBERT_VECTOR_BYTES == 64
constexpr int kGemmRows = 12;
constexpr int kGemmPanels = 2;
#elif FILBERT_VECTOR_BYTES == 32
constexpr int kGemmRows = 6;
constexpr int kGemmPanels = 1;
#else
constexpr int kGemmRows = FILBERT_TILE_ROWS > 6 ? 5 : 2;  // 32 registers elsewhere than on x86
constexpr int kGemmPanels = 1;
#endif
constexpr int kStripCols = kGemmPanels * kPanelCols;

// Inner steps of one chain of additions. A tile's part of the panels, 8 KB of float32 with one
// panel and 16 KB with two, lies in L1 while all row tiles of a block read it. Chains of 256 are as
// fast, and their error is up to twice that of PyTorch's product.
constexpr int64_t kBlockSteps = 128;

// Steps in a turn of the loop: two share the loop's own instructions and the pointers to rows, 1 to
// 3 % of the time. With four some sums go through memory.
constexpr int kGemmUnrolled = FILBERT_VECTOR_BYTES >= 32 ? 2 : 1;

// Panels that one row reads side by side: as many independent sums as hide the latency.
constexpr int kOneRowPanels = kPanelVectors <= 2 ? 4 : 2;

// The bytes of rows that go over all panels before the next ones: they stay in L2 beside the
// panels, and the weight is read once for each such block. Processors with AVX-512 have 1 MB of L2
// or more, others from 256 KB on and mostly 512.
constexpr int64_t kBlockBytes = (FILBERT_VECTOR_BYTES == 64 ? 640 : 320) * 1024;

// How many rows are that many bytes: whole tiles, two at least, so that a part of the panels in L1
// is used twice, and no more than keep the strip of sums there too.
constexpr int64_t gemm_block_rows(int64_t row_bytes) {
  const int64_t tiles = row_bytes > 0 ? kBlockBytes / (row_bytes * kGemmRows) : 16;
  const int64_t most = 96 / kGemmRows;
  return kGemmRows * (tiles < 2 ? 2 : tiles > most ? most : tiles);
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
