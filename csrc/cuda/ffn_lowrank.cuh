// A feed-forward part of four low-rank factors in one kernel: what is as wide as the inner
// dimension exists as 64 columns of a block's rows, in shared memory.
//
//   p = x A_up^T                         kRows x rank, 16 bits, stays in shared memory
//   for 64 columns of the inner width
//     t = act(p B_up^T + bias)           kRows x 64, shared memory
//     s += t A_down^T                    kRows x rank, float32, stays in registers
//   out = s B_down^T + bias              64 columns at a time
//
// Nothing is computed twice.
//
// With few rows several blocks share the inner width. Each leaves its s, and another kernel adds
// them up in their order before the last product.
#pragma once

#include "cuda/lowrank/block.cuh"

namespace filbert {
namespace cuda {

// kSplit: a block has its share of the inner width, and leaves sums.
template <typename T, int kRows, int kColumns, bool kSplit>
__global__ void __launch_bounds__(static_cast<int>(kLowRankThreads), 1)
    ffn_lowrank_kernel(const __grid_constant__ FfnLowRankArgs args) {
  const int tiles = divided_up(args.inner, static_cast<int>(kLowRankColumns));
  const int splits = kSplit ? static_cast<int>(args.splits) : 1, split = blockIdx.x % splits;
  const LowRankBlock<T, kRows, kColumns> block(args, int64_t{blockIdx.x / splits} * kRows);
  block.to_rank();
  typename LowRankBlock<T, kRows, kColumns>::Sums sums = {};
  block.through(sums, tiles * split / splits, tiles * (split + 1) / splits);
  if constexpr (kSplit) {
    block.leave(sums, split);
  } else {
    block.keep(sums);
    block.lift(Activation::kNone);
  }
}

template <typename T, int kRows, int kColumns>
__global__ void __launch_bounds__(static_cast<int>(kLowRankThreads), 1)
    ffn_lowrank_lift_kernel(const __grid_constant__ FfnLowRankArgs args) {
  const LowRankBlock<T, kRows, kColumns> block(args, int64_t{blockIdx.x} * kRows);
  block.gather(static_cast<int>(args.splits));
  block.lift(Activation::kNone);
}

}  // namespace cuda
}  // namespace filbert
