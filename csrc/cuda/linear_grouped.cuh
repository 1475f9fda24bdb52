// Rows of 8-bit codes times a weight of a few bits, on tensor cores: mma.m16n8k32 of unsigned codes
// and signed numbers, exact in 32 bits.
//
// A block makes one tile of outputs. Codes and weights come through shared memory in stages of four
// units, 128 inputs, the next one loading while this one is multiplied. Weights stay as few bits as
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

// How the warps of a block share its tile: kStrips times 16 rows and kColumns panels each.
template <int kDown_, int kAcross_, int kStrips_, int kColumns_>
struct GroupedTiling {
  static constexpr int kDown = kDown_, kAcross = kAcross_, kStrips = kStrips_, kColumns = kColumns_;
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
using GroupedLargeTiling = GroupedTiling<4, 2, 2, 4>;
using GroupedScaledTiling = GroupedTiling<2, 4, 2, 2>;
using GroupedSmallTiling = GroupedTiling<2, 2, 1, 2>;
static_assert(GroupedLargeTiling::is(kGroupedLargeTile), "");
static_assert(GroupedScaledTiling::is(kGroupedScaledTile), "");
static_assert(GroupedSmallTiling::is(kGroupedSmallTile), "");

// Where things lie in one stage of shared memory: 128 codes of each row, then the units of each
// panel.
template <typename Tiling, int kBits>
struct GroupedStage {
  static constexpr int kUnitBytes = kBits * static_cast<int>(kGroupedUnitBytes);
  static constexpr int kPanelBytes = kStageUnits * kUnitBytes;
  static constexpr int kCodeBytes = Tiling::kRows * kStageInputs;
  static constexpr int kBytes = kCodeBytes + Tiling::kPanels * kPanelBytes;
  uint32_t base;

  // 16 codes. XORed with the row, so that eight rows of one piece touch all banks.
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

template <typename Tiling, int kBits>
struct GroupedOperands {
  using Stage = GroupedStage<Tiling, kBits>;
  const LinearGroupedArgs& args;
  int row_tile, output_tile, units;

  __device__ __forceinline__ explicit GroupedOperands(const LinearGroupedArgs& args) : args(args) {
    const int across = divided_up(args.outputs, Tiling::kOutputs);
    row_tile = blockIdx.x / across;
    output_tile = blockIdx.x % across;
    units = divided_up(args.inputs, static_cast<int>(kGroupedUnit));
  }
  __device__ __forceinline__ int64_t row() const { return int64_t{row_tile} * Tiling::kRows; }
  __device__ __forceinline__ int panel() const { return output_tile * Tiling::kPanels; }
  __device__ __forceinline__ int stages() const { return divided_up(units, kStageUnits); }

  // Starts copying stage `number`, with zeros for what is not there.
  __device__ __forceinline__ void fetch(const Stage& to, int number) const {
    fetch_codes(to, number * kStageInputs);
    fetch_weights(to, number * kStageUnits);
  }

 private:
  __device__ __forceinline__ void fetch_codes(const Stage& to, int first) const {
    constexpr int kPieces = kStageInputs / 16, kStep = Tiling::kThreads / kPieces;
    const int piece = threadIdx.x % kPieces;
    const int inside = at_most(args.inputs - first - piece * 16, 16);
    const int rows = at_most(args.rows - row(), Tiling::kRows);
    const uint8_t* codes = args.codes.codes + row() * args.codes.codes_row + first + piece * 16;
    const bool whole = reinterpret_cast<uintptr_t>(args.codes.codes) % 16 == 0 &&
                       (args.codes.codes_row | args.inputs) % 16 == 0;
    for (int r = threadIdx.x / kPieces; r < Tiling::kRows; r += kStep) {
      const bool there = r < rows && inside > 0;
      const uint8_t* from = there ? codes + r * args.codes.codes_row : args.codes.codes;
      if (whole) {
        cp_async_16(to.codes(r, piece), from, there);
      } else {
        store_shared_16(to.codes(r, piece), gather_bytes(from, there ? inside : 0));
      }
    }
  }

  __device__ __forceinline__ void fetch_weights(const Stage& to, int first_unit) const {
    constexpr int kPieces = Stage::kPanelBytes / 16;  // of a panel, contiguous in memory
    const int panels = divided_up(args.outputs, static_cast<int>(kGroupedPanel)) - panel();
    const int pieces = at_most(units - first_unit, kStageUnits) * (Stage::kUnitBytes / 16);
    const uint8_t* weight =
        args.weight + (int64_t{panel()} * units + first_unit) * Stage::kUnitBytes;
    for (int at = threadIdx.x; at < Tiling::kPanels * kPieces; at += Tiling::kThreads) {
      const int p = at / kPieces, piece = at % kPieces;
      const int unit = piece / (kBits * 4), vector = piece / 4 % kBits;
      const bool there = p < panels && piece < pieces;
      const uint8_t* from =
          there ? weight + int64_t{p} * units * Stage::kUnitBytes + piece * 16 : args.weight;
      cp_async_16(to.weights(p, unit, vector, piece % 4), from, there);
    }
  }
};

// Of one warp: sums[strip][column][odd] are the fragments of the strip's rows with the even and the
// odd ones of a panel's outputs, 2^(8-bits) times as large as they should be. Finished groups are
// in `totals`.
template <typename Tiling, int kBits, bool kScaled>
struct GroupedSums {
  int32_t sums[Tiling::kStrips][Tiling::kColumns][2][4] = {};
  int32_t totals[kScaled ? Tiling::kStrips : 1][kScaled ? Tiling::kColumns : 1][2][4] = {};

  __device__ __forceinline__ void multiply(const GroupedStage<Tiling, kBits>& stage, int unit,
                                           int row, int panel, int lane) {
    const int group = lane / 4, place = lane % 4;
    uint32_t a[Tiling::kStrips][4];
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; ++s) {
      ldmatrix_x4(a[s], stage.codes(row + s * 16 + lane % 16, unit * 2 + lane / 16));
    }
#pragma unroll
    for (int c = 0; c < Tiling::kColumns; ++c) {
      const NumberPairs numbers = numbers_of<kBits>(place, [&](int vector) {
        return load_shared_8(stage.weights(panel + c, unit, vector, group / 2) + group % 2 * 8);
      });
#pragma unroll
      for (int s = 0; s < Tiling::kStrips; ++s) {
        mma_16832_u8s8(sums[s][c][0], a[s], numbers.low.x, numbers.high.x);
        mma_16832_u8s8(sums[s][c][1], a[s], numbers.low.y, numbers.high.y);
      }
    }
  }

  // Ends a group: its sums go to the totals.
  __device__ __forceinline__ void scale(const LinearGroupedArgs& args, int panel, int group,
                                        int place) {
    const int panels = divided_up(args.outputs, static_cast<int>(kGroupedPanel));
#pragma unroll
    for (int c = 0; c < Tiling::kColumns; ++c) {
      const uint32_t four = panel + c < panels ? multipliers_of(args, panel + c, group, place) : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t m = four >> (8 * i) & 255;
#pragma unroll
        for (int s = 0; s < Tiling::kStrips; ++s) {
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

  // Output 4 t + i of a panel, for the strip's row g + 8 half.
  __device__ __forceinline__ int32_t at(int strip, int column, int half, int i) const {
    const int place = half * 2 + i / 2;
    if constexpr (kScaled) return totals[strip][column][i % 2][place];
    return sums[strip][column][i % 2][place] >> (8 - kBits);
  }
  __device__ __forceinline__ uint4 four(int strip, int column, int half) const {
    return uint4{static_cast<uint32_t>(at(strip, column, half, 0)),
                 static_cast<uint32_t>(at(strip, column, half, 1)),
                 static_cast<uint32_t>(at(strip, column, half, 2)),
                 static_cast<uint32_t>(at(strip, column, half, 3))};
  }
};

// From fragments to results. A warp turns its sums of 16 rows at a time in shared memory, where no
// operand is left, so that neighbouring lanes write neighbouring outputs, and one rolled loop makes
// results of them: unrolled over the fragments, it was half a megabyte of code, and three quarters
// of the time on an H200 went into fetching instructions.
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
    const int place = lane % kLanes * 4;
    const GroupedWriter write(args);
#pragma unroll
    for (int s = 0; s < Tiling::kStrips; ++s) {
      __syncwarp();  // all lanes have read the last strip's
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < Tiling::kColumns; ++c) {
          store_shared_16(
              at(half * 8 + lane / 4, c * static_cast<int>(kGroupedPanel) + lane % 4 * 4),
              sums.four(s, c, half));
        }
      }
      __syncwarp();
      // Read again for each strip: before, all registers hold sums.
      const GroupedColumns columns(args, panel * static_cast<int>(kGroupedPanel) + place);
#pragma unroll 1
      for (int r = lane / kLanes; r < 16; r += 32 / kLanes) {
        const int64_t n = row + s * 16 + r;
        if (n >= args.rows) break;
        const uint4 four = load_shared_16(at(r, place));
        const int32_t own[4] = {static_cast<int32_t>(four.x), static_cast<int32_t>(four.y),
                                static_cast<int32_t>(four.z), static_cast<int32_t>(four.w)};
        write(n, columns, own, args.codes.scale[n], args.codes.zero[n]);
      }
    }
  }

 private:
  __device__ __forceinline__ uint32_t at(int row, int output) const {
    return base + row * kRowBytes + output * 4;
  }
};

template <typename Tiling, int kBits, bool kScaled>
__global__ void __launch_bounds__(Tiling::kThreads, 512 / Tiling::kThreads)
    linear_grouped_kernel(const __grid_constant__ LinearGroupedArgs args) {
  using Stage = GroupedStage<Tiling, kBits>;
  const GroupedOperands<Tiling, kBits> operands(args);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / Tiling::kAcross * Tiling::kStrips * 16;
  const int warp_panel = warp % Tiling::kAcross * Tiling::kColumns;
  const uint32_t memory = shared_address(shared_memory());
  const auto stage_at = [memory](int number) { return Stage{memory + number % 2 * Stage::kBytes}; };
  const int stages = operands.stages();
  const int group_units = kScaled ? operands.units / static_cast<int>(args.groups) : 0;
  const auto fetch = [&](int stage) {
    if (stage < stages) operands.fetch(stage_at(stage), stage);
    cp_async_commit();
  };
  GroupedSums<Tiling, kBits, kScaled> sums;
  fetch(0);
  for (int stage = 0; stage < stages; ++stage) {
    fetch(stage + 1);
    cp_async_wait<1>();
    __syncthreads();  // this stage is there
    const int units = at_most(operands.units - stage * kStageUnits, kStageUnits);
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
      sums.multiply(stage_at(stage), unit, warp_row, warp_panel, lane);
      if constexpr (kScaled) {
        const int done = stage * kStageUnits + unit + 1;
        if (done % group_units == 0) {
          sums.scale(args, operands.panel() + warp_panel, done / group_units - 1, lane % 4);
        }
      }
    }
    __syncthreads();  // nobody reads it any more
  }
  cp_async_wait<0>();
  GroupedResults<Tiling>(args, memory, warp, lane)
      .write(sums, operands.row() + warp_row, operands.panel() + warp_panel);
}

}  // namespace cuda
}  // namespace filbert
