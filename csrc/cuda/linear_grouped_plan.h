#pragma once

#include <algorithm>

#include "args/linear_grouped.h"
#include "cuda/device/plan.h"

namespace filbert {
namespace cuda {

// What one block makes of linear_grouped.
struct GroupedTileSize {
  int64_t rows, outputs, threads;
  int64_t warp_outputs;  // side by side in one warp
};
constexpr GroupedTileSize kGroupedLargeTile{128, 128, 256, 32};
// With groups of more than 4 bits: twice the sums.
constexpr GroupedTileSize kGroupedScaledTile{64, 128, 256, 32};
constexpr GroupedTileSize kGroupedSmallTile{32, 64, 128, 32};  // where large ones would be too few
constexpr GroupedTileSize kGroupedFewTile{16, 16, 256, 16};    // its warps share the inputs

// Units of 32 inputs that lie in shared memory at a time: whole groups.
constexpr int64_t kGroupedStageUnits = 4;
// Of so many stages there is room: one that is multiplied, the others on their way.
constexpr int64_t kGroupedStages = 3;

// From this many rows on large tiles make do without splitting the inputs.
constexpr int64_t kGroupedFewRows = 32;
// Of all GPUs from 8.0 on a block can have this much shared memory.
constexpr int64_t kGroupedMostShared = 96 * 1024;

enum class GroupedKernel { kFew, kSmall, kLarge };

struct LinearGroupedPlan {
  GroupedKernel kernel;
  LaunchPlan launch;
  bool quantizes;  // numbers become codes in a launch of their own
};

// Bytes between rows of codes in shared memory of the kernel for few rows.
constexpr int64_t grouped_code_row(int64_t inputs) {
  return ceil_div(inputs, kGroupedUnit) * kGroupedUnit + 16;
}

// Bytes between rows of sums that a warp turns in shared memory: two rows, of which eight lanes
// write 16 bytes each, touch all banks.
constexpr int64_t grouped_result_row(int64_t outputs) { return outputs * 4 + 64; }
// For the 16 rows that each warp of a block turns at a time.
constexpr int64_t grouped_result_bytes(const GroupedTileSize& tile) {
  return tile.threads / 32 * 16 * grouped_result_row(tile.warp_outputs);
}

inline LinearGroupedPlan plan_linear_grouped(const LinearGroupedArgs& args,
                                             int64_t multiprocessors) {
  const bool numbers = args.x != nullptr;
  // Codes of 16 rows, their scales and zeros, and the sums of 8 warps.
  const int64_t few_bytes = 16 * grouped_code_row(args.inputs) + 16 * 8 + 8 * 16 * 16 * 4;
  if (args.rows <= kGroupedFewRows && !args.offset && few_bytes <= kGroupedMostShared) {
    const int64_t blocks = ceil_div(args.rows, 16) * ceil_div(args.outputs, 16);
    return {GroupedKernel::kFew, {blocks, kGroupedFewTile.threads, few_bytes}, false};
  }
  const auto blocks = [&](const GroupedTileSize& tile) {
    return ceil_div(args.rows, tile.rows) * ceil_div(args.outputs, tile.outputs);
  };
  const GroupedTileSize& large =
      args.multiplier && args.bits > 4 ? kGroupedScaledTile : kGroupedLargeTile;
  const bool small = blocks(large) < multiprocessors;
  const GroupedTileSize& tile = small ? kGroupedSmallTile : large;
  const int64_t stage = kGroupedStageUnits * (tile.rows * kGroupedUnit +
                                              tile.outputs / 16 * kGroupedUnitBytes * args.bits);
  const int64_t stages =
      std::min(kGroupedStages, ceil_div(args.inputs, kGroupedStageUnits * kGroupedUnit));
  return {small ? GroupedKernel::kSmall : GroupedKernel::kLarge,
          {blocks(tile), tile.threads, std::max(stages * stage, grouped_result_bytes(tile))},
          numbers};
}

}  // namespace cuda
}  // namespace filbert
