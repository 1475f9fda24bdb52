// What the kernels that go over rows share: eight neighbouring values in registers, as float32.
#pragma once

#include <cstdint>

#include "cuda/ptx.cuh"

namespace filbert {
namespace cuda {

constexpr int kEight = 8;

template <typename T>
__device__ __forceinline__ void load_eight(float (&to)[kEight], const T* from) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "16 bytes hold eight or four values");
  constexpr int kPerLoad = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kEight; i += kPerLoad) {
    union {
      uint4 bytes;
      T values[kPerLoad];
    } piece;
    piece.bytes = load_16(from + i);
#pragma unroll
    for (int j = 0; j < kPerLoad; ++j) to[i + j] = to_float(piece.values[j]);
  }
}

// The first n of eight, one by one; zeros for the others.
template <typename T>
__device__ __forceinline__ void load_some(float (&to)[kEight], const T* from, int n) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) to[i] = i < n ? to_float(from[i]) : 0.0f;
}
template <typename T>
__device__ __forceinline__ void store_some(T* to, const float (&from)[kEight], int n) {
#pragma unroll
  for (int i = 0; i < kEight; ++i) {
    if (i < n) to[i] = from_float<T>(from[i]);
  }
}

template <typename T>
__device__ __forceinline__ void store_eight(T* to, const float (&from)[kEight]) {
  constexpr int kPerStore = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kEight; i += kPerStore) {
    union {
      uint4 bytes;
      T values[kPerStore];
    } piece;
#pragma unroll
    for (int j = 0; j < kPerStore; ++j) piece.values[j] = from_float<T>(from[i + j]);
    store_16(to + i, piece.bytes);
  }
}

__device__ __forceinline__ float sum_over_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

}  // namespace cuda
}  // namespace filbert
