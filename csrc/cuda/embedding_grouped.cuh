// Rows of tables of codes, summed and normalised: a warp for each row. Codes are few bytes, so a
// row is summed anew from L1 for the mean, for the variance and for the result.
#pragma once

#include "args/embedding_grouped.h"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kEmbeddingWarps = 4;

// One row of a table.
struct TableEntry {
  const uint8_t* codes = nullptr;
  float scale = NAN;
  bool halves = false;

  __device__ __forceinline__ TableEntry() {}
  __device__ __forceinline__ TableEntry(const CodeTable& table, int64_t row, int64_t width)
      : halves(table.bits == 4) {
    const int64_t id = table.ids[row];
    const bool there = id >= 0 && id < table.entries;
    codes = table.codes + (there ? id : 0) * (halves ? (width + 1) / 2 : width);
    if (there) scale = table.scale[id];
  }
  __device__ __forceinline__ float at(int i) const {
    const int code = halves ? (codes[i / 2] >> (i % 2 * 4) & 15) - 8 : codes[i] - 128;
    return multiply_rn(static_cast<float>(code), scale);
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * kEmbeddingWarps)
    embedding_grouped_kernel(const __grid_constant__ EmbeddingGroupedArgs args) {
  const int lane = threadIdx.x % 32, width = static_cast<int>(args.outputs);
  const T* weight = static_cast<const T*>(args.norm_weight);
  const T* bias = static_cast<const T*>(args.norm_bias);
  const int64_t warps = int64_t{gridDim.x} * kEmbeddingWarps;
  for (int64_t row = blockIdx.x * kEmbeddingWarps + threadIdx.x / 32; row < args.rows;
       row += warps) {
    const bool two = args.tables[1].ids, three = args.tables[2].ids;
    const TableEntry first(args.tables[0], row, width);
    TableEntry second, third;
    if (two) second = TableEntry(args.tables[1], row, width);
    if (three) third = TableEntry(args.tables[2], row, width);
    const auto value = [&](int i) {
      float sum = first.at(i);
      if (two) sum += second.at(i);
      if (three) sum += third.at(i);
      return sum;
    };
    T* out = static_cast<T*>(args.out) + row * width;
    if (!weight) {
      for (int i = lane; i < width; i += 32) out[i] = from_float<T>(value(i));
      continue;
    }
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane; i < width; i += 32) sum += value(i);
    const float mean = sum_over_warp(sum) / width;
    for (int i = lane; i < width; i += 32) {
      const float d = value(i) - mean;
      squares = fmaf(d, d, squares);
    }
    const float rstd = 1.0f / sqrtf(sum_over_warp(squares) / width + args.eps);
    for (int i = lane; i < width; i += 32) {
      out[i] = from_float<T>(
          fmaf(multiply_rn(value(i) - mean, rstd), to_float(weight[i]), to_float(bias[i])));
    }
  }
}

}  // namespace cuda
}  // namespace filbert
