#pragma once

#include "args/ffn_lowrank.h"
#include "cuda/device/plan.h"

namespace filbert {
namespace cuda {

constexpr int64_t kLowRankThreads = 256;
constexpr int64_t kLowRankColumns = 64;  // of the inner width, or of the outputs, at a time

// So many blocks keep every multiprocessor of a large GPU busy. It is a number and not the GPU's
// own, so that a call gives the same bits on all of them.
constexpr int64_t kLowRankBlocks = 96;
constexpr int64_t kLowRankMostSplits = 8;
constexpr int64_t kLowRankFewestTiles = 4;  // of inner columns, for each split

struct FfnLowRankPlan {
  int64_t tile_rows;  // 128, or 64 where there are few
  int64_t columns;    // that ranks are rounded up to: 128 or 256
  int64_t splits;     // of the inner width; with more than one, another kernel adds them up
  LaunchPlan product, lift;
};

// Shared memory: a row tile as wide as a rank, one of 64 columns, and two stages of factors.
constexpr int64_t low_rank_shared_bytes(int64_t rows, int64_t columns) {
  return 2 * (rows * columns + rows * kLowRankColumns + 2 * kLowRankColumns * columns);
}

inline FfnLowRankPlan plan_ffn_lowrank(const FfnLowRankArgs& args) {
  FfnLowRankPlan plan{};
  plan.columns = most(args.up.rank, args.down.rank) <= 128 ? 128 : kLowRankMostRankCuda;
  plan.tile_rows = ceil_div(args.rows, 128) >= kLowRankBlocks ? 128 : 64;
  const int64_t blocks = ceil_div(args.rows, plan.tile_rows);
  const int64_t tiles = ceil_div(args.inner, kLowRankColumns);
  const int64_t wanted = least(ceil_div(kLowRankBlocks, most(blocks, 1)), kLowRankMostSplits);
  plan.splits = most(1, least(wanted, tiles / kLowRankFewestTiles));
  const int64_t shared = low_rank_shared_bytes(plan.tile_rows, plan.columns);
  plan.product = {blocks * plan.splits, kLowRankThreads, shared};
  plan.lift = {plan.splits > 1 ? blocks : 0, kLowRankThreads, shared};
  return plan;
}

}  // namespace cuda
}  // namespace filbert
