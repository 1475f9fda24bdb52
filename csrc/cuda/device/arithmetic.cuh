// Arithmetic on sizes and places, which are int on the device.
#pragma once

#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int clamped(int n, int most) { return larger(0, smaller(n, most)); }

// What device/plan.h has for the host.
__device__ __forceinline__ int divided_up(int64_t a, int b) {
  return static_cast<int>((a + b - 1) / b);
}
__device__ __forceinline__ int at_most(int64_t n, int limit) {
  return n < limit ? static_cast<int>(n) : limit;
}

}  // namespace cuda
}  // namespace filbert
