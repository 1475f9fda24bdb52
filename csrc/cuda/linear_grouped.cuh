// Rows of 8-bit codes times a weight of a few bits, on tensor cores: mma.m16n8k32 of unsigned codes
// and signed numbers, exact in 32 bits.
//
// A block makes one tile of outputs. Codes and weights come through shared memory in stages of four
// units, 128 inputs, two stages ahead of the one that is multiplied. Weights stay as few bits as
// they are in memory up to the registers (linear_grouped/numbers.cuh).
#pragma once

#include "cuda/linear_grouped/results.cuh"
#include "cuda/linear_grouped/sums.cuh"

namespace filbert {
namespace cuda {

// Whether all multipliers of `count` panels from `panel` on have one digit. Every warp finds out
// for itself.
template <int kBits>
__device__ __forceinline__ bool one_digit(const LinearGroupedArgs& args, int panel, int count,
                                          int lane) {
  const int panels = divided_up(args.outputs, static_cast<int>(kGroupedPanel));
  const uint8_t* from = args.multiplier + int64_t{panel} * args.groups * kGroupedPanel;
  const int all = at_most(panels - panel, count) * static_cast<int>(args.groups);
  uint32_t bits = 0;
#pragma unroll 2
  for (int i = lane; i < all; i += 32) {
    const uint4 sixteen = load_16(from + int64_t{i} * 16);
    bits |= sixteen.x | sixteen.y | sixteen.z | sixteen.w;
  }
  return __ballot_sync(~0u, (bits & ~(kLargestFolded<kBits> * 0x01010101u)) != 0) == 0;
}

template <typename Tiling, int kBits, bool kScaled>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    linear_grouped_kernel(const __grid_constant__ LinearGroupedArgs args) {
  using Stage = GroupedStage<Tiling, kBits>;
  const int across = divided_up(args.outputs, Tiling::kOutputs);
  const int64_t row = int64_t{blockIdx.x / across} * Tiling::kRows;
  const int panel = blockIdx.x % across * Tiling::kPanels;
  const int units = divided_up(args.inputs, static_cast<int>(kGroupedUnit));
  const int stages = divided_up(units, kStageUnits);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / Tiling::kAcross * Tiling::kStrips * 16;
  const int warp_panel = warp % Tiling::kAcross * Tiling::kColumns;
  const uint32_t memory = shared_address(shared_memory());
  // A ring of stages: while one is multiplied, the next ones come.
  const auto after = [memory](uint32_t stage) {
    return stage == memory + (kStages - 1) * Stage::kBytes ? memory : stage + Stage::kBytes;
  };
  GroupedSums<Tiling, kBits, kScaled> sums(args, panel + warp_panel, lane);
  constexpr bool kFolds = kScaled && kGroupedFolds<kBits>;
  const int group_units = kScaled ? units / static_cast<int>(args.groups) : 0;
  // Once, or for each digit of the multipliers, the upper one first.
  for (int digit = kFolds && !one_digit<kBits>(args, panel, Tiling::kPanels, lane); digit >= 0;
       --digit) {
    GroupedFetch<Tiling, kBits> fetch(args, row, panel);
    int missing = group_units;  // units that the group has yet to get
    if constexpr (kScaled) sums.restart();
    if constexpr (kFolds) sums.fold(digit), sums.expect();
    uint32_t read = memory, write = memory;
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (stage < stages) fetch.next(write);
      cp_async_commit();
      write = after(write);
    }
    for (int stage = 0; stage < stages; ++stage) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there, and nobody reads the one before any more
      if (stage + kStages - 1 < stages) fetch.next(write);
      cp_async_commit();
      write = after(write);
      // Units past the last one are zeros.
#pragma unroll
      for (int unit = 0; unit < kStageUnits; ++unit) {
        sums.multiply(Stage{read}, unit, warp_row, warp_panel);
        if constexpr (kScaled) {
          if (--missing == 0) {
            missing = group_units;
            if constexpr (kFolds) {
              sums.fold(digit);
            } else {
              sums.scale();
            }
            sums.expect();
          }
        }
      }
      read = after(read);
    }
    if (digit > 0) {
      sums.raise();
      __syncthreads();  // nobody reads the last stages any more
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // nobody reads operands any more
  GroupedResults<Tiling>(args, memory, warp, lane).write(sums, row + warp_row, panel + warp_panel);
}

}  // namespace cuda
}  // namespace filbert
