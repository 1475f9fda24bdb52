// Up to 32 rows: a block makes 16 outputs of 16 rows, and its eight warps share the inputs. Sums
// are integers, so it does not matter which warp adds what. Numbers become codes in the block:
// every block does it again, which takes less time than a launch of its own.
#pragma once

#include "cuda/device/arithmetic.cuh"
#include "cuda/device/quantize.cuh"
#include "cuda/linear_grouped/epilogue.cuh"
#include "cuda/linear_grouped/numbers.cuh"
#include "cuda/linear_grouped_plan.h"

namespace filbert {
namespace cuda {

constexpr int kFewWarps = 8, kFewRows = 16;

// Shared memory: codes of the rows, their scales and zeros, and the sums of each warp.
struct FewMemory {
  int code_row;

  __device__ __forceinline__ explicit FewMemory(const LinearGroupedArgs& args)
      : code_row(divided_up(args.inputs, static_cast<int>(kGroupedUnit)) *
                     static_cast<int>(kGroupedUnit) +
                 16) {}
  __device__ __forceinline__ uint8_t* codes(int row) const {
    return reinterpret_cast<uint8_t*>(shared_memory()) + row * code_row;
  }
  __device__ __forceinline__ float* scales() const {
    return reinterpret_cast<float*>(codes(kFewRows));
  }
  __device__ __forceinline__ int32_t* zeros() const {
    return reinterpret_cast<int32_t*>(scales() + kFewRows);
  }
  __device__ __forceinline__ int32_t* sums(int warp) const {
    return zeros() + kFewRows + warp * kFewRows * static_cast<int>(kGroupedPanel);
  }
};

// A row of numbers to codes, by one warp. Where `whole`, eight numbers are read at a time.
template <typename T>
__device__ __forceinline__ RowScale few_codes(const T* x, int width, bool whole, int lane,
                                              uint8_t* codes) {
  RowRange range;
  if (whole) {
#pragma unroll 2
    for (int k = lane * kEight; k < width; k += 32 * kEight) {
      Eight<T> values;
      values.load(x + k);
#pragma unroll
      for (int i = 0; i < kEight; ++i) range.add(values[i]);
    }
  } else {
    for (int k = lane; k < width; k += 32) range.add(to_float(x[k]));
  }
  range.over_warp();
  const RowScale by = scale_of(range);
  const float inverse = inverse_of(by.scale);
  if (whole) {
#pragma unroll 1
    for (int k = lane * kEight; k < width; k += 32 * kEight) {
      Eight<T> values;
      values.load(x + k);
      uint32_t words[2] = {};
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        words[i / 4] |= code_of(values[i], inverse, by) << (8 * (i % 4));
      }
      *reinterpret_cast<uint2*>(codes + k) = uint2{words[0], words[1]};
    }
  } else {
#pragma unroll 1
    for (int k = lane; k < width; k += 32) {
      codes[k] = static_cast<uint8_t>(code_of(to_float(x[k]), inverse, by));
    }
  }
  return by;
}
template <typename T>
__device__ __forceinline__ RowScale few_codes_of(const LinearGroupedArgs& args, int64_t row,
                                                 int lane, uint8_t* codes) {
  const bool whole = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                     args.x_row % (16 / sizeof(T)) == 0 && args.inputs % kEight == 0;
  return few_codes(static_cast<const T*>(args.x) + row * args.x_row, static_cast<int>(args.inputs),
                   whole, lane, codes);
}

// A row of codes, by one warp.
__device__ __forceinline__ void copy_codes(const uint8_t* from, int width, int lane,
                                           uint8_t* codes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && width % 16 == 0) {
    for (int k = lane * 16; k < width; k += 32 * 16) {
      *reinterpret_cast<uint4*>(codes + k) = load_16(from + k);
    }
  } else {
    for (int k = lane; k < width; k += 32) codes[k] = from[k];
  }
}

// The codes of the block's rows, with zeros up to whole units and for rows that are not there.
__device__ __forceinline__ void few_rows_of(const LinearGroupedArgs& args, const FewMemory& memory,
                                            int64_t first, int warp, int lane) {
  const int width = static_cast<int>(args.inputs);
  const int whole = memory.code_row - 16;
  for (int r = warp; r < kFewRows; r += kFewWarps) {
    const int64_t row = first + r;
    uint8_t* codes = memory.codes(r);
    RowScale by = {0.0f, 0};
    int written = 0;
    if (row < args.rows) {
      written = width;
      if (!args.x) {
        copy_codes(args.codes.codes + row * args.codes.codes_row, width, lane, codes);
        by = {args.codes.scale[row], args.codes.zero[row]};
      } else if (args.dtype == DType::kFloat32) {
        by = few_codes_of<float>(args, row, lane, codes);
      } else if (args.dtype == DType::kBFloat16) {
        by = few_codes_of<bf16>(args, row, lane, codes);
      } else {
        by = few_codes_of<fp16>(args, row, lane, codes);
      }
    }
    for (int k = written + lane; k < whole; k += 32) codes[k] = 0;
    if (lane == 0) memory.scales()[r] = by.scale, memory.zeros()[r] = by.zero;
  }
}

template <int kBits, bool kScaled>
__global__ void __launch_bounds__(32 * kFewWarps, 3)
    linear_grouped_few_kernel(const __grid_constant__ LinearGroupedArgs args) {
  const FewMemory memory(args);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, place = lane % 4;
  const int panels = divided_up(args.outputs, static_cast<int>(kGroupedPanel));
  const int panel = blockIdx.x % panels;
  const int64_t first = int64_t{blockIdx.x / panels} * kFewRows;
  const int units = divided_up(args.inputs, static_cast<int>(kGroupedUnit));
  const int group_units = kScaled ? units / static_cast<int>(args.groups) : 1;
  const int shares = units / group_units;  // of whole groups
  const int begin = warp * shares / kFewWarps * group_units;
  const int end = (warp + 1) * shares / kFewWarps * group_units;
  constexpr int kUnitBytes = kBits * static_cast<int>(kGroupedUnitBytes);
  const uint8_t* weight = args.weight + int64_t{panel} * units * kUnitBytes;
  // The weights come from memory while rows become codes.
  for (int at = begin * kUnitBytes + lane * 128; at < end * kUnitBytes; at += 32 * 128) {
    prefetch_l2(weight + at);
  }
  few_rows_of(args, memory, first, warp, lane);
  __syncthreads();  // the codes are there

  const uint32_t codes =
      shared_address(memory.codes(lane % 16)) + static_cast<uint32_t>(lane / 16 * 16);
  int32_t sums[2][4] = {}, total[2][4] = {};
#pragma unroll 2
  for (int unit = begin; unit < end; ++unit) {
    const uint8_t* from = weight + unit * kUnitBytes + group * 8;
    const NumberPairs numbers =
        numbers_of<kBits>(place, [from](int vector) { return load_8(from + vector * 64); });
    uint32_t a[4];
    ldmatrix_x4(a, codes + unit * static_cast<int>(kGroupedUnit));
    mma_16832_u8s8(sums[0], a, numbers.low.x, numbers.high.x);
    mma_16832_u8s8(sums[1], a, numbers.low.y, numbers.high.y);
    if (kScaled && (unit + 1) % group_units == 0) {
      const uint32_t four = multipliers_of(args, panel, unit / group_units, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t m = four >> (8 * i) & 255;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int32_t& sum = sums[i % 2][half * 2 + i / 2];
          total[i % 2][half * 2 + i / 2] += (sum >> (8 - kBits)) * m;
          sum = 0;
        }
      }
    }
  }
  // Output 4 t + i of the panel, for rows g and g + 8.
  int32_t* own = memory.sums(warp);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = half * 2 + i / 2;
      own[(group + 8 * half) * static_cast<int>(kGroupedPanel) + place * 4 + i] =
          kScaled ? total[i % 2][at] : sums[i % 2][at] >> (8 - kBits);
    }
  }
  __syncthreads();  // all warps' sums are there
  if (threadIdx.x >= kFewRows * 4) return;
  const int r = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
  Four<int32_t> all{};
  for (int w = 0; w < kFewWarps; ++w) {
    const int32_t* part = memory.sums(w) + r * static_cast<int>(kGroupedPanel) + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) all.values[i] += part[i];
  }
  const GroupedColumns columns(args, panel * static_cast<int>(kGroupedPanel) + column);
  GroupedWriter{args}(first + r, columns, all, memory.scales()[r], memory.zeros()[r]);
}

}  // namespace cuda
}  // namespace filbert
