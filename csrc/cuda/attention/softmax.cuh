// The softmax of scores that lie in mma fragments: running maximum and sum, a warp's strip at a
// time.
#pragma once

#include "args/attn_varlen.h"
#include "cuda/device/ptx.cuh"

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

// What a score is multiplied by to be the logarithm of its weight, natural and to base two. Scores
// that get biases are scaled before that, and nothing is left to do but change the base.
struct ScoreScale {
  float natural, log2;
};
template <bool kBiased>
__device__ __forceinline__ ScoreScale score_scale(const AttnVarlenArgs& args) {
  return {kBiased ? 1.0f : args.scale, kBiased ? kLog2E : multiply_rn(args.scale, kLog2E)};
}

// Whether scores before they are scaled are in the order of their weights, and their differences
// may overflow only where a weight is 0. Else they are scaled first, as where there are biases.
__host__ __device__ constexpr bool keeps_order(float scale) {
  return scale >= 0x1p-64f && scale <= 0x1p64f;
}

// What weights are relative to before any score is known: no finite score is below it. Of a row
// that sees no key all scores are -inf, and so are their differences to it: all weights are 0.
constexpr float kLowest = -0x1.fffffep127f;

// The difference comes first: that of the largest score is exactly 0, however large it is.
__device__ __forceinline__ float weight_of(float score, float top, float log2) {
  return exp2_approx(multiply_rn(score - top, log2));
}

// A maximum that grows by less than this, as an exponent, leaves the shift where it is: weights up
// to 2^8 are as exact as others, and what was summed before need not be scaled.
constexpr float kLazyExponent = 8.0f;

// The running softmax of the two fragment rows a lane holds.
struct RowStats {
  float top[2] = {kLowest, kLowest};  // what weights are relative to
  float sum[2] = {0.0f, 0.0f};        // of this lane's columns only, until total()

  // Turns scores into weights; what was summed before is to be scaled by `rescale`, which is 1
  // unless the maximum grew much. With kAll all scores are there; else pairs of tiles past the
  // first `keys` keys are left as they are.
  template <bool kAll, int kTiles>
  __device__ __forceinline__ void update(float (&scores)[kTiles][4], int keys,
                                         const ScoreScale& scale, float (&rescale)[2]) {
    float added[2] = {}, top_now[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (kAll || n * 8 < keys) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& largest = top_now[i % 4 / 2];
          largest = fmaxf(largest, scores[n + i / 4][i % 4]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top_now[half] = row_max(top_now[half]);
      const float growth = multiply_rn(top_now[half] - top[half], scale.log2);
      const bool grew = growth > kLazyExponent;
      rescale[half] = grew ? exp2_approx(-growth) : 1.0f;
      if (grew) top[half] = top_now[half];
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (kAll || n * 8 < keys) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& score = scores[n + i / 4][i % 4];
          score = weight_of(score, top[i % 4 / 2], scale.log2);
          added[i % 4 / 2] += score;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) sum[half] = sum[half] * rescale[half] + added[half];
  }

  __device__ __forceinline__ void total() {
    sum[0] = row_sum(sum[0]);
    sum[1] = row_sum(sum[1]);
  }
  __device__ __forceinline__ float log_sum_exp(bool second, const ScoreScale& scale) const {
    return multiply_rn(second ? top[1] : top[0], scale.natural) + logf(second ? sum[1] : sum[0]);
  }
  __device__ __forceinline__ float inverse(int half) const {
    return sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];
  }
};

}  // namespace cuda
}  // namespace filbert
