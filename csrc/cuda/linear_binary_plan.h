#pragma once

#include "args/linear_binary.h"
#include "cuda/device/plan.h"

namespace filbert {
namespace cuda {

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

}  // namespace cuda
}  // namespace filbert
