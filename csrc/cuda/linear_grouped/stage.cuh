// How a block shares its tile among warps, where its operands lie in shared memory, and how they
// get there.
#pragma once

#include "cuda/device/arithmetic.cuh"
#include "cuda/device/ptx.cuh"
#include "cuda/linear_grouped_plan.h"

namespace filbert {
namespace cuda {

constexpr int kStageUnits = static_cast<int>(kGroupedStageUnits);
constexpr int kStageInputs = kStageUnits * static_cast<int>(kGroupedUnit);
constexpr int kStages = static_cast<int>(kGroupedStages);

// How the warps of a block share its tile: kStrips times 16 rows and kColumns panels each. So many
// blocks fit a multiprocessor.
template <int kDown_, int kAcross_, int kStrips_, int kColumns_, int kBlocks_>
struct GroupedTiling {
  static constexpr int kDown = kDown_, kAcross = kAcross_, kStrips = kStrips_, kColumns = kColumns_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kRows = kDown * kStrips * 16, kPanels = kAcross * kColumns;
  static constexpr int kOutputs = kPanels * static_cast<int>(kGroupedPanel);
  static constexpr int kThreads = kDown * kAcross * 32;

  static constexpr GroupedTileSize size() {
    return {kRows, kOutputs, kThreads, kColumns * static_cast<int>(kGroupedPanel)};
  }
  static constexpr bool is(const GroupedTileSize& size) {
    return size.rows == kRows && size.outputs == kOutputs && size.threads == kThreads &&
           size.warp_outputs == kColumns * static_cast<int>(kGroupedPanel);
  }
};
using GroupedLargeTiling = GroupedTiling<2, 4, 4, 2, 2>;
using GroupedScaledTiling = GroupedTiling<2, 4, 2, 2, 2>;
using GroupedSmallTiling = GroupedTiling<2, 2, 1, 2, 4>;
static_assert(GroupedLargeTiling::is(kGroupedLargeTile), "");
static_assert(GroupedScaledTiling::is(kGroupedScaledTile), "");
static_assert(GroupedSmallTiling::is(kGroupedSmallTile), "");

// Where things lie in one stage of shared memory: 128 codes of each row, then the units of each
// panel. A stage begins at a multiple of 128.
template <typename Tiling, int kBits>
struct GroupedStage {
  static constexpr int kUnitBytes = kBits * static_cast<int>(kGroupedUnitBytes);
  static constexpr int kPanelBytes = kStageUnits * kUnitBytes;
  static constexpr int kCodeBytes = Tiling::kRows * kStageInputs;
  static constexpr int kBytes = kCodeBytes + Tiling::kPanels * kPanelBytes;
  uint32_t base;

  // 16 codes. XORed with the row, so that eight rows of one piece touch all banks. That of another
  // unit is found by XOR with 32 times its number, that of another 16 rows by addition.
  __device__ __forceinline__ uint32_t codes(int row, int piece) const {
    return base + row * kStageInputs + (piece ^ row % 8) * 16;
  }
  // 16 bytes of a vector of a unit. Two vectors fill a line; every other line is turned by half, so
  // that half a warp, four vectors by four pairs of outputs, touches all banks.
  __device__ __forceinline__ uint32_t weights(int panel, int unit, int vector, int quarter) const {
    return base + kCodeBytes + panel * kPanelBytes + unit * kUnitBytes + vector * 64 +
           (quarter ^ vector / 2 % 2 * 2) * 16;
  }
};

// 16 bytes at `from`, of which `inside` are there, whatever their alignment.
__device__ __forceinline__ uint4 gather_bytes(const uint8_t* from, int inside) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < inside) words[i / 4] |= uint32_t{from[i]} << (8 * (i % 4));
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// What a thread copies of one stage after the other, with zeros for what is not there: 16 codes of
// some rows, and pieces of one panel. What stages have in common is worked out once.
template <typename Tiling, int kBits>
class GroupedFetch {
  using Stage = GroupedStage<Tiling, kBits>;
  static constexpr int kCodePieces = kStageInputs / 16;            // of a row
  static constexpr int kRowStep = Tiling::kThreads / kCodePieces;  // from copy to copy
  static constexpr int kRun = 16;                                  // pieces side by side
  static constexpr int kRuns = Stage::kPanelBytes / (kRun * 16);   // of a panel
  static constexpr int kRunStep = Tiling::kThreads / kRun / Tiling::kPanels;
  static constexpr int kRowCopies = Tiling::kRows / kRowStep;
  static constexpr int kRunCopies = static_cast<int>(ceil_div(kRuns, kRunStep));
  static_assert(kRowStep % 8 == 0 && Tiling::kRows % kRowStep == 0, "");
  static_assert(Tiling::kThreads % (kRun * Tiling::kPanels) == 0, "");

 public:
  __device__ __forceinline__ GroupedFetch(const LinearGroupedArgs& args, int64_t row, int panel) {
    const int r = threadIdx.x / kCodePieces, code_piece = threadIdx.x % kCodePieces;
    code_row = args.codes.codes_row;
    codes = args.codes.codes + (row + r) * code_row + code_piece * 16;
    codes_to = Stage{0}.codes(r, code_piece);
    rows = at_most(args.rows - row, Tiling::kRows) - r;
    inputs = static_cast<int>(args.inputs) - code_piece * 16;
    whole = reinterpret_cast<uintptr_t>(args.codes.codes) % 16 == 0 &&
            (code_row | args.inputs) % 16 == 0;

    const int units = divided_up(args.inputs, static_cast<int>(kGroupedUnit));
    const int panels = divided_up(args.outputs, static_cast<int>(kGroupedPanel));
    const int own = threadIdx.x / kRun % Tiling::kPanels;
    run = threadIdx.x / kRun / Tiling::kPanels;
    const int piece = run * kRun + threadIdx.x % kRun;
    weights = args.weight + int64_t{panel + own} * units * Stage::kUnitBytes + piece * 16;
    pieces = panel + own < panels ? units * (Stage::kUnitBytes / 16) - piece : 0;
#pragma unroll
    for (int i = 0; i < kRunCopies; ++i) {
      const int at = piece + i * kRunStep * kRun;
      weights_to[i] = Stage{0}.weights(own, at / (kBits * 4), at / 4 % kBits, at % 4);
    }
  }

  // Starts copying the next stage to `stage`.
  __device__ __forceinline__ void next(uint32_t stage) {
    if (whole) {
      const uint8_t* from = codes;
#pragma unroll
      for (int i = 0; i < kRowCopies; ++i) {
        cp_async_16(stage + codes_to + i * kRowStep * kStageInputs, from,
                    inputs > 0 && i * kRowStep < rows);
        from += kRowStep * code_row;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kRowCopies; ++i) {
        const int inside = i * kRowStep < rows ? inputs : 0;
        store_shared_16(stage + codes_to + i * kRowStep * kStageInputs,
                        gather_bytes(codes + i * kRowStep * code_row, inside));
      }
    }
#pragma unroll
    for (int i = 0; i < kRunCopies; ++i) {
      if (kRuns % kRunStep != 0 && run + i * kRunStep >= kRuns) break;
      cp_async_16(stage + weights_to[i], weights + i * kRunStep * kRun * 16,
                  i * kRunStep * kRun < pieces);
    }
    codes += kStageInputs, inputs -= kStageInputs;
    weights += Stage::kPanelBytes, pieces -= Stage::kPanelBytes / 16;
  }

 private:
  const uint8_t *codes, *weights;
  int64_t code_row;
  uint32_t codes_to, weights_to[kRunCopies];
  int rows, inputs, pieces, run;  // left of them, counted from the thread's own
  bool whole;                     // codes can be copied by 16 bytes
};

}  // namespace cuda
}  // namespace filbert
