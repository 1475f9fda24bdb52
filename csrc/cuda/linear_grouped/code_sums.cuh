#pragma once

#include "args/linear_grouped.h"
#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

// The sums of a row's codes in each group, which offsets are multiplied with: a warp for each row.
constexpr int kCodeSumWarps = 4;
static __global__ void __launch_bounds__(32 * kCodeSumWarps)
    linear_grouped_code_sums_kernel(const __grid_constant__ LinearGroupedArgs args) {
  const int lane = threadIdx.x % 32, size = static_cast<int>(args.inputs / args.groups);
  const int64_t warps = int64_t{gridDim.x} * kCodeSumWarps;
  for (int64_t row = blockIdx.x * kCodeSumWarps + threadIdx.x / 32; row < args.rows; row += warps) {
    const uint8_t* codes = args.codes.codes + row * args.codes.codes_row;
    for (int g = 0; g < args.groups; ++g) {
      int sum = 0;
      for (int k = lane; k < size; k += 32) sum += codes[g * size + k];
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      if (lane == 0) args.code_sums[row * args.groups + g] = sum;
    }
  }
}

}  // namespace cuda
}  // namespace filbert
