// A product with a weight of two thin factors in one kernel: what is as wide as the rank stays in
// shared memory.
#pragma once

#include "cuda/lowrank/block.cuh"

namespace filbert {
namespace cuda {

template <typename T, int kRows, int kColumns>
__global__ void __launch_bounds__(static_cast<int>(kLowRankThreads), 1)
    linear_lowrank_kernel(const __grid_constant__ FfnLowRankArgs args) {
  const LowRankBlock<T, kRows, kColumns> block(args, int64_t{blockIdx.x} * kRows);
  block.to_rank();
  block.lift(args.activation);
}

}  // namespace cuda
}  // namespace filbert
