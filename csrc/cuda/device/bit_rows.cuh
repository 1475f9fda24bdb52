// Rows of packed bits: their copies in shared memory, and sums over the lanes that share a row.
#pragma once

#include <cstdint>

#include "cuda/device/arithmetic.cuh"
#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

// A lane's place in the fragments of mma, see ptx.cuh.
struct BitLane {
  int warp = threadIdx.x / 32;
  int id = threadIdx.x % 32;
  int group = id / 4;  // the fragment row it holds, and that row + 8
  int place = id % 4;  // among the four lanes that share these rows
};

// Starts copying the first `inside` of four words to shared memory, and zeros for the others.
__device__ __forceinline__ void fetch_words(uint32_t to, const uint32_t* from, int inside,
                                            const uint32_t* readable) {
#pragma unroll
  for (int i = 0; i < 4; ++i) cp_async_4(to + 4 * i, i < inside ? from + i : readable, i < inside);
}
// The same in one piece, where all four are inside or none, and aligned.
__device__ __forceinline__ void fetch_piece(uint32_t to, const uint32_t* from, int inside,
                                            const uint32_t* readable) {
  cp_async_16(to, inside > 0 ? from : readable, inside > 0);
}

// The OR, and the sum, of a value over the four lanes that share a fragment row.
__device__ __forceinline__ uint32_t or_over_row(uint32_t x) {
  x |= __shfl_xor_sync(0xffffffffu, x, 1);
  return x | __shfl_xor_sync(0xffffffffu, x, 2);
}
template <typename T>
__device__ __forceinline__ T sum_over_row(T x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ int max_over_row(int x) {
  int other = __shfl_xor_sync(0xffffffffu, x, 1);
  x = other > x ? other : x;
  other = __shfl_xor_sync(0xffffffffu, x, 2);
  return other > x ? other : x;
}

}  // namespace cuda
}  // namespace filbert
