// How a CUDA kernel is launched, as a pure function of the call's shape and the GPU's size: tested
// and printed without a GPU, and free of anything only the GPU knows. In particular no plan looks
// at sequence lengths, so a captured graph stays right when they change. A stem's own plan is in
// cuda/<stem>_plan.h.
#pragma once

#include <cstdint>

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

// A kernel that gives each warp a row at a time, or each thread some bytes.
inline LaunchPlan plan_strided(int64_t units, int64_t units_per_block, int64_t threads,
                               int64_t multiprocessors, int64_t shared_bytes = 0) {
  const int64_t blocks = ceil_div(units, units_per_block);
  return {least(blocks, multiprocessors * kBlocksPerMultiprocessor), threads, shared_bytes};
}

}  // namespace cuda
}  // namespace filbert
