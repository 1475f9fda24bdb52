// What the kernels that go over rows share: eight neighbouring values in registers, as float32, and
// four that are read or written in one access.
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

constexpr int kEight = 8;

// Whether every row of an operand starts at a multiple of 16 bytes; true for an absent one.
inline bool aligned(const void* p, int64_t stride_bytes = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

// Eight values as they lie in memory: loads can be started before anything waits for them.
template <typename T>
struct Eight {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "16 bytes hold eight or four values");
  static constexpr int kPerLoad = 16 / sizeof(T);
  union Piece {
    uint4 bytes;
    T values[kPerLoad];
  } pieces[kEight / kPerLoad];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kEight / kPerLoad; ++i) pieces[i].bytes = load_16(from + i * kPerLoad);
  }
  __device__ __forceinline__ float operator[](int i) const {
    return to_float(pieces[i / kPerLoad].values[i % kPerLoad]);
  }
};

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

// Four neighbouring values in one access of 16 or 8 bytes.
template <typename T>
struct Four {
  union {
    uint4 sixteen;
    uint2 eight;
    T values[4];
  };

  __device__ __forceinline__ void load(const T* from) {
    if (sizeof(T) == 4) {
      sixteen = load_16(from);
    } else {
      eight = load_8(from);
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    if (sizeof(T) == 4) {
      store_16(to, sixteen);
    } else {
      store_8(to, eight);
    }
  }
};

// Whether rows of a [T, N] operand can be accessed by four values at a time.
template <typename T>
__device__ __forceinline__ bool by_fours(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0 && stride % 4 == 0;
}

__device__ __forceinline__ float sum_over_warp(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

}  // namespace cuda
}  // namespace filbert
