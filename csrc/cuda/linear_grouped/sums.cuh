// The products of a warp: fragments, and what groups do to them.
#pragma once

#include "cuda/linear_grouped/numbers.cuh"
#include "cuda/linear_grouped/stage.cuh"

namespace filbert {
namespace cuda {

// Of one warp: sums[strip][column][odd] are the fragments of the strip's rows with the even and the
// odd ones of a panel's outputs. Groups have their multipliers in the numbers, or else, and without
// groups, sums are 2^(8-bits) times as large as they should be and finished groups are in `totals`.
template <typename Tiling, int kBits, bool kScaled>
class GroupedSums {
  static constexpr bool kFolds = kScaled && kGroupedFolds<kBits>;
  static constexpr bool kTotals = kScaled && !kFolds;
  static constexpr int kStrips = Tiling::kStrips, kColumns = Tiling::kColumns;
  int32_t sums[kStrips][kColumns][2][4] = {};
  int32_t totals[kTotals ? kStrips : 1][kTotals ? kColumns : 1][2][4] = {};
  Folding folding[kFolds ? kColumns : 1][2];
  uint32_t coming[kScaled ? kColumns : 1];  // multipliers of the next group, ahead of time
  const uint8_t* multiplier;                // of the one after that
  int groups;                               // left from there on
  const LinearGroupedArgs& args;
  int panel, panels, lane;

 public:
  // first_panel: of the warp.
  __device__ __forceinline__ GroupedSums(const LinearGroupedArgs& args, int first_panel, int lane)
      : args(args),
        panel(first_panel),
        panels(divided_up(args.outputs, static_cast<int>(kGroupedPanel))),
        lane(lane) {}

  // row and panel: of the warp in the stage.
  __device__ __forceinline__ void multiply(const GroupedStage<Tiling, kBits>& stage, int unit,
                                           int row, int panel) {
    const int group = lane / 4, place = lane % 4;
    const uint32_t codes =
        stage.codes(row + lane % 16, lane / 16) ^ static_cast<uint32_t>(unit) * 32;
    uint32_t a[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) ldmatrix_x4(a[s], codes + s * 16 * kStageInputs);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const auto load = [&](int vector) {
        return load_shared_8(stage.weights(panel + c, unit, vector, group / 2) + group % 2 * 8);
      };
      NumberPairs numbers;
      if constexpr (kFolds) {
        numbers = products_of<kBits>(place, folding[c][0], folding[c][1], load);
      } else {
        numbers = numbers_of<kBits>(place, load);
      }
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        mma_16832_u8s8(sums[s][c][0], a[s], numbers.low.x, numbers.high.x);
        mma_16832_u8s8(sums[s][c][1], a[s], numbers.low.y, numbers.high.y);
      }
    }
  }

  // Goes back to the first group: asks for its multipliers.
  __device__ __forceinline__ void restart() {
    const int own = kFolds ? lane / 4 * 2 : lane % 4 * 4;
    multiplier = args.multiplier + int64_t{panel} * args.groups * kGroupedPanel + own;
    groups = static_cast<int>(args.groups);
    expect();
  }

  // Asks for the multipliers of the next group: where they are folded of outputs 2 g and 2 g + 1 of
  // each panel, else of outputs 4 t .. 4 t + 3. Past the last one they are 0.
  __device__ __forceinline__ void expect() {
    const bool more = groups > 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const uint8_t* from = multiplier + c * args.groups * kGroupedPanel;
      coming[c] = 0;
      if (more && panel + c < panels) {
        coming[c] = kFolds ? *reinterpret_cast<const uint16_t*>(from)
                           : *reinterpret_cast<const uint32_t*>(from);
      }
    }
    multiplier += kGroupedPanel, --groups;
  }

  // From now on numbers are multiplied by the multipliers that came, of which digit 0 or 1 counts.
  __device__ __forceinline__ void fold(int digit) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t m = (coming[c] >> (odd * 8) & 255) >> (digit * kFoldedDigit<kBits>);
        folding[c][odd] = Folding::of<kBits>(m & kLargestFolded<kBits>);
      }
    }
  }

  // What was summed is of the upper digit.
  __device__ __forceinline__ void raise() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[s][c][i / 4][i % 4] *= 1 << kFoldedDigit<kBits>;
      }
    }
  }

  // Ends a group that is not folded: its sums go to the totals.
  __device__ __forceinline__ void scale() {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t m = coming[c] >> (8 * i) & 255;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            int32_t& sum = sums[s][c][i % 2][half * 2 + i / 2];
            totals[s][c][i % 2][half * 2 + i / 2] += (sum >> (8 - kBits)) * m;
            sum = 0;
          }
        }
      }
    }
  }

  // Outputs 4 t .. 4 t + 3 of a panel, for the strip's row g + 8 half.
  __device__ __forceinline__ uint4 four(int strip, int column, int half) const {
    return uint4{at(strip, column, half, 0), at(strip, column, half, 1), at(strip, column, half, 2),
                 at(strip, column, half, 3)};
  }

 private:
  __device__ __forceinline__ uint32_t at(int strip, int column, int half, int i) const {
    const int place = half * 2 + i / 2;
    if constexpr (kTotals) return totals[strip][column][i % 2][place];
    const int32_t sum = sums[strip][column][i % 2][place];
    return static_cast<uint32_t>(kFolds ? sum : sum >> (8 - kBits));
  }
};

}  // namespace cuda
}  // namespace filbert
