// How each CUDA kernel is launched, as a pure function of the call's shape and the GPU's size:
// tested and printed without a GPU, and free of anything only the GPU knows. In particular nothing
// here looks at sequence lengths, so a captured graph stays right when they change.
#pragma once

#include <cstdint>

#include "args/attn_binary.h"
#include "args/attn_tiles.h"
#include "args/attn_varlen.h"
#include "args/linear_binary.h"

namespace filbert {
namespace cuda {

struct LaunchPlan {
  int64_t blocks;
  int64_t threads;
  int64_t shared_bytes;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks per multiprocessor of a kernel whose blocks stride over their work: more than can run at
// once, so that the hardware balances them.
constexpr int64_t kBlocksPerMultiprocessor = 16;

constexpr int64_t kAttnThreads = 128;

// The instantiation a head dimension runs on: the next of 32, 64 and 128, missing columns zero.
constexpr int64_t attn_tile_dim(int64_t dim) { return dim <= 32 ? 32 : dim <= 64 ? 64 : 128; }

// Q, K and V of one tile of rows; K and V of a longer sequence pass through in blocks of half.
constexpr int64_t attn_shared_bytes(int64_t tile_dim) { return 3 * kAttnTileRows * tile_dim * 2; }

// The float32 kernel: 16 query rows, 32 keys and values, and the weights between them.
constexpr int64_t kAttnF32Rows = 16, kAttnF32Keys = 32;
constexpr int64_t attn_f32_shared_bytes(int64_t dim) {
  return (kAttnF32Rows * (dim + kAttnF32Keys) + 2 * kAttnF32Keys * (dim + 4)) * 4;
}

// The most blocks that self-attention over `sequences` sequences of `rows` rows together can need,
// whatever their lengths; one more sequence are the rows that none owns.
//
// A sequence of n rows needs f(n) blocks. f steps up at 1, 17 and 33 rows, where fewer heads share
// a block (heads_per_block in attn_work.cuh), and every 128 rows from 129 on. A line a + b n that
// is nowhere below f bounds the sum of all f(n) by a (sequences + 1) + b rows. With b >= heads /
// 128 and no corner of the first four steps above it, it is nowhere below f. The tightest lines go
// through two neighbouring corners of the hull of f, which are 0, 1, 33, 129, 257, ...; the least
// of their bounds is taken. A slope is an integer of 384ths of a block.
constexpr int64_t attn_self_blocks(int64_t rows, int64_t sequences, int64_t heads) {
  constexpr int64_t kUnit = 3 * kAttnTileRows;
  const int64_t fours = ceil_div(heads, 4), twos = ceil_div(heads, 2);
  const int64_t corner_rows[] = {1, 17, 33, kAttnTileRows + 1};
  const int64_t corner_blocks[] = {fours, twos, heads, 2 * heads};
  const int64_t slopes[] = {
      kUnit * fours,                          // 0 to 1: fewer rows than sequences
      most(12 * (heads - fours), 3 * heads),  // 1 to 33: short texts
      4 * heads,                              // 33 to 129
      3 * heads,                              // from 129 on: long texts
  };
  int64_t bound = (rows / kAttnTileRows + sequences + 1) * heads;
  for (const int64_t slope : slopes) {
    int64_t start = 0;
    for (int i = 0; i < 4; ++i) {
      start = most(start, kUnit * corner_blocks[i] - slope * corner_rows[i]);
    }
    bound = least(bound, ((sequences + 1) * start + slope * rows) / kUnit);
  }
  return bound;
}

// A block for each item there can be; those past the end of the list return at once.
inline LaunchPlan plan_attn_varlen(const AttnVarlenArgs& args) {
  const int64_t shared = args.dtype == DType::kFloat32 ? attn_f32_shared_bytes(args.dim)
                                                       : attn_shared_bytes(attn_tile_dim(args.dim));
  const int64_t blocks = args.self_attention
                             ? attn_self_blocks(args.rows_q, args.sequences, args.heads)
                             : args.capacity * args.heads;
  return {args.rows_q == 0 ? 0 : blocks, kAttnThreads, shared};
}

// One block: the list is a counting sort, and its bins live in that block's shared memory.
constexpr int kTileBins = 66;
inline LaunchPlan plan_attn_tiles(const AttnTilesArgs&) { return {1, 256, 2 * kTileBins * 4}; }

// A kernel that gives each warp a row at a time, or each thread some bytes.
inline LaunchPlan plan_strided(int64_t units, int64_t units_per_block, int64_t threads,
                               int64_t multiprocessors, int64_t shared_bytes = 0) {
  const int64_t blocks = ceil_div(units, units_per_block);
  return {least(blocks, multiprocessors * kBlocksPerMultiprocessor), threads, shared_bytes};
}

// --- binary operators ---

// Whether a GPU multiplies bits on its tensor cores. Capability is 10 * major + minor. From 10.0 on
// the one-bit mma is there and emulated; before 8.0 it has no AND.
constexpr bool has_binary_tensor_cores(int64_t capability) {
  return capability >= 80 && capability < 100;
}

// Words of K that lie in shared memory at a time, for each row and each output of a block's tile.
constexpr int64_t kBinaryChunkWords = 32;

// The tile of linear_binary that one block makes.
struct BinaryTileSize {
  int64_t rows, outputs, threads;
};
constexpr BinaryTileSize kBinaryLargeTile{128, 128, 256};
constexpr BinaryTileSize kBinarySmallTile{32, 64, 128};  // where large ones would be too few

// By __popc: a warp makes 32 outputs of some rows.
constexpr int64_t kPopcountWarps = 4, kPopcountRows = 8;
// As many rows as __popc takes where there are tensor cores: from here on mma wastes too much.
constexpr int64_t kPopcountFewRows = 2;

struct LinearBinaryPlan {
  bool tensor_cores;    // else __popc on ordinary cores
  BinaryTileSize tile;  // of a block
  LaunchPlan launch;
};

inline LinearBinaryPlan plan_linear_binary(const LinearBinaryArgs& args, int64_t multiprocessors,
                                           int64_t capability) {
  const bool aligned = reinterpret_cast<uintptr_t>(args.weight) % 16 == 0;
  if (!has_binary_tensor_cores(capability) || args.rows <= kPopcountFewRows || !aligned) {
    const int64_t rows = args.rows <= kPopcountFewRows ? 1 : kPopcountRows;
    const int64_t warps = ceil_div(args.outputs, 32) * ceil_div(args.rows, rows);
    return {false,
            {rows, 32 * kPopcountWarps, 32 * kPopcountWarps},
            {ceil_div(warps, kPopcountWarps), 32 * kPopcountWarps, 0}};
  }
  const auto blocks = [&](const BinaryTileSize& tile) {
    return ceil_div(args.rows, tile.rows) * ceil_div(args.outputs, tile.outputs);
  };
  const bool small =
      args.rows <= kBinarySmallTile.rows || blocks(kBinaryLargeTile) < multiprocessors;
  const BinaryTileSize& tile = small ? kBinarySmallTile : kBinaryLargeTile;
  const int64_t stages = ceil_div(args.row_words, kBinaryChunkWords) * args.planes;
  const int64_t stage_bytes = (tile.rows + tile.outputs) * kBinaryChunkWords * 4;
  const int64_t terms = (3 * tile.outputs + 2 * tile.rows) * 4;
  return {true, tile, {blocks(tile), tile.threads, terms + (stages > 1 ? 2 : 1) * stage_bytes}};
}

// attn_binary: a block takes some query rows of one sequence, and a warp a head of them.
constexpr int64_t kAttnBinaryWarps = 6;   // at most
constexpr int64_t kAttnBinaryKeys = 128;  // in shared memory at a time
// Head dimensions up to 64 run on tiles of two words, the others on four.
constexpr int64_t attn_binary_tile_words(int64_t dim) { return dim <= 64 ? 2 : 4; }
constexpr int64_t attn_binary_tile_rows(int64_t dim) { return dim <= 64 ? 32 : 16; }

// The warps of a block: all heads in as few turns as the bound allows, all turns of one size.
constexpr int64_t attn_binary_warps(int64_t heads) {
  return ceil_div(heads, ceil_div(heads, kAttnBinaryWarps));
}

// From one row of keys or values to the next, in pieces of 16 bytes: odd, so that eight rows' worth
// of one piece touch all banks.
constexpr int64_t attn_binary_row_pieces(int64_t warps, int64_t dim) {
  return ceil_div(warps * (dim / 32), 4) | 1;
}

inline LaunchPlan plan_attn_binary(const AttnBinaryArgs& args) {
  const int64_t warps = attn_binary_warps(args.heads), rows = attn_binary_tile_rows(args.dim);
  // No sequence is longer than all rows, whatever the hint says.
  const int64_t tiles = most(1, ceil_div(least(args.max_seqlen, args.rows), rows));
  const int64_t keys_and_values =
      2 * kAttnBinaryKeys * attn_binary_row_pieces(warps, args.dim) * 16;
  const int64_t transposed = warps * attn_binary_tile_words(args.dim) * 32 * 16;
  const int64_t table = args.table ? (args.dim + 1) * 8 : 0;
  return {(args.sequences + 1) * tiles, 32 * warps,
          keys_and_values + transposed + table + rows * 4};
}

}  // namespace cuda
}  // namespace filbert
