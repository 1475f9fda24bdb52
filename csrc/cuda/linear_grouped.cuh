// Rows of 8-bit codes times a weight of a few bits, on tensor cores: mma.m16n8k32 of unsigned codes
// and signed numbers, exact in 32 bits.
//
// A block makes one tile of outputs. Codes and weights come through shared memory in stages of four
// units, 128 inputs, two stages ahead of the one that is multiplied. Weights stay as few bits as
// they are in memory up to the registers (linear_grouped/numbers.cuh).
#pragma once

#include "cuda/device/arithmetic.cuh"
#include "cuda/linear_grouped/epilogue.cuh"
#include "cuda/linear_grouped/numbers.cuh"
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

// From fragments to results. A warp turns its sums of 16 rows at a time in shared memory, where no
// operand is left, so that neighbouring lanes write neighbouring outputs, and one rolled loop makes
// results of them: unrolled over the fragments, it was half a megabyte of code, and on an H200 warps
// waited for instructions most of all. Where little follows the product, a short
// way takes a fifth of the instructions.
template <typename Tiling>
struct GroupedResults {
  static constexpr int kOutputs = Tiling::kColumns * static_cast<int>(kGroupedPanel);
  static constexpr int kLanes = kOutputs / 4;  // of a row, four outputs each
  static constexpr int kRowBytes = static_cast<int>(grouped_result_row(kOutputs));
  static constexpr int kWarpBytes = 16 * kRowBytes;
  static_assert(Tiling::kThreads / 32 * kWarpBytes == grouped_result_bytes(Tiling::size()), "");

  const LinearGroupedArgs& args;
  uint32_t base;  // the warp's part of shared memory
  int lane;

  __device__ __forceinline__ GroupedResults(const LinearGroupedArgs& args, uint32_t memory,
                                            int warp, int lane)
      : args(args), base(memory + warp * kWarpBytes), lane(lane) {}

  // sums: of the strips from `row` on and the columns from `panel` on.
  template <typename Sums>
  __device__ __forceinline__ void write(const Sums& sums, int64_t row, int panel) const {
    const int first = panel * static_cast<int>(kGroupedPanel) + lane % kLanes * 4;
    const GroupedWriter write(args);
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; ++s) {
      __syncwarp();  // all lanes have read the last strip's
      turn(sums, s);
      // Read again for each strip: before, all registers hold sums.
      const GroupedColumns columns(args, first);
      const int64_t begin = row + s * 16;
      if (write.is_plain<fp16, false>(columns, DType::kFloat16)) {
        plain<fp16, false>(write, columns, begin);
      } else if (write.is_plain<bf16, false>(columns, DType::kBFloat16)) {
        plain<bf16, false>(write, columns, begin);
      } else if (write.is_plain<float, true>(columns, DType::kFloat32)) {
        plain<float, true>(write, columns, begin);  // codes will be made of them
      } else {
#pragma unroll 1
        for (int r = lane / kLanes; r < 16; r += kStep) {
          if (begin + r >= args.rows) break;
          const int64_t n = begin + r;
          write(n, columns, own(r), args.codes.scale[n], args.codes.zero[n]);
        }
      }
    }
  }

 private:
  static constexpr int kStep = 32 / kLanes;  // rows at a time

  __device__ __forceinline__ uint32_t at(int row, int output) const {
    return base + row * kRowBytes + output * 4;
  }
  // The four sums of a row that this lane makes results of.
  __device__ __forceinline__ Four<int32_t> own(int row) const {
    Four<int32_t> four;
    four.sixteen = load_shared_16(at(row, lane % kLanes * 4));
    return four;
  }

  template <typename Sums>
  __device__ __forceinline__ void turn(const Sums& sums, int strip) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < Tiling::kColumns; ++c) {
        store_shared_16(at(half * 8 + lane / 4, c * static_cast<int>(kGroupedPanel) + lane % 4 * 4),
                        sums.four(strip, c, half));
      }
    }
    __syncwarp();
  }

  // Where little follows. Without an activation all rows' scales and zeros are asked for at once.
  template <typename T, bool kActivates>
  __device__ __forceinline__ void plain(const GroupedWriter& write, const GroupedColumns& columns,
                                        int64_t begin) const {
    const int left = at_most(args.rows - begin, 16), mine = lane / kLanes;
    if constexpr (kActivates) {
#pragma unroll 1
      for (int r = mine; r < left; r += kStep) {
        const float by = args.codes.scale[begin + r];
        write.plain<T, true>(begin + r, columns, own(r), by, args.codes.zero[begin + r]);
      }
    } else {
      float by[16 / kStep];
      int32_t zero[16 / kStep];
#pragma unroll
      for (int i = 0; i < 16 / kStep; ++i) {
        const bool there = mine + i * kStep < left;
        by[i] = there ? args.codes.scale[begin + mine + i * kStep] : 0.0f;
        zero[i] = there ? args.codes.zero[begin + mine + i * kStep] : 0;
      }
#pragma unroll
      for (int i = 0; i < 16 / kStep; ++i) {
        const int r = mine + i * kStep;
        if (r < left) write.plain<T, false>(begin + r, columns, own(r), by[i], zero[i]);
      }
    }
  }
};

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
