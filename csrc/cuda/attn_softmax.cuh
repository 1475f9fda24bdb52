// The softmax of scores that lie in mma fragments: running maximum and sum, a warp's strip at a
// time.
#pragma once

#include "cuda/ptx.cuh"

namespace filbert {
namespace cuda {

constexpr float kLog2E = 1.44269504088896341f;

// Over the four lanes that share a fragment row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A row that sees no key has a maximum of -inf; 0 in its place keeps all its weights at 0.
__device__ __forceinline__ float finite_shift(float top) { return top == -INFINITY ? 0.0f : top; }

__device__ __forceinline__ float weight_of(float score, float shift) {
  return exp2_approx(multiply_rn(score - shift, kLog2E));
}

// The running softmax of the two fragment rows a lane holds.
struct RowStats {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of this lane's columns only, until total()

  // Turns the scores of the first `keys` keys into weights relative to the new maximum; what was
  // summed before is to be scaled by `rescale`. Whole tiles past the last key stay as they are, 0.
  template <int kTiles>
  __device__ __forceinline__ void update(float (&scores)[kTiles][4], int keys,
                                         float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top_now = top[half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n * 8 < keys) {
          top_now = fmaxf(top_now, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
        }
      }
      top_now = row_max(top_now);
      const float shift = finite_shift(top_now);
      rescale[half] = weight_of(top[half], shift);
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (n * 8 < keys) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[n][i] = weight_of(scores[n][i], shift);
            added += scores[n][i];
          }
        }
      }
      top[half] = top_now;
      sum[half] = sum[half] * rescale[half] + added;
    }
  }

  __device__ __forceinline__ void total() {
    sum[0] = row_sum(sum[0]);
    sum[1] = row_sum(sum[1]);
  }
  __device__ __forceinline__ float log_sum_exp(int half) const {
    return finite_shift(top[half]) + logf(sum[half]);
  }
  __device__ __forceinline__ float inverse(int half) const {
    return sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
  }
};

}  // namespace cuda
}  // namespace filbert
