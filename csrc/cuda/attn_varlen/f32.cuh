// Packed variable-length attention for float32 on ordinary cores: the same work list, the same
// meaning, no tensor cores. It exists so that a float32 model runs in float32.
//
// Each of the four warps holds four query rows. 32 keys and values at a time go to shared memory; a
// lane computes the scores of one key with all four rows, then the output columns lane, lane + 32,
// ...
#pragma once

#include "cuda/attention/work.cuh"
#include "cuda/attn_varlen_plan.h"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kF32Rows = static_cast<int>(kAttnF32Rows) / 4;  // of one warp
constexpr int kF32Keys = static_cast<int>(kAttnF32Keys);
constexpr int kF32Columns = 4;  // of one lane, up to 128 / 32

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  return x;
}

// Rows of float32 to shared memory, a warp a row, 16 bytes a lane; rows past `rows` become zeros.
__device__ __forceinline__ void copy_rows(float* to, int to_stride, const void* from, int64_t first,
                                          int64_t row_stride, int64_t offset, int rows,
                                          int all_rows, int dim) {
  const float* p = static_cast<const float*>(from) + first * row_stride + offset;
  const int column = static_cast<int>(threadIdx.x % 32) * 4;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < all_rows; row += kAttnThreads / 32) {
    if (column >= dim) continue;
    const uint4 piece = row < rows ? load_16(p + row * row_stride + column) : uint4{};
    *reinterpret_cast<uint4*>(to + row * to_stride + column) = piece;
  }
}

// 16 query rows from `first` of the item, for one head.
__device__ __forceinline__ void attend_f32(const AttnVarlenArgs& args, const AttnWork& work,
                                           int head, int first) {
  const int dim = static_cast<int>(args.dim), stride = dim + 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp * kF32Rows;
  float* q = reinterpret_cast<float*>(shared_memory());          // [16, dim]
  float* k = q + kAttnF32Rows * dim;                             // [32, stride]
  float* v = k + kF32Keys * stride;                              // [32, stride]
  float* weights = v + kF32Keys * stride + warp_row * kF32Keys;  // [4, 32] of this warp
  const ScoreBias bias(args, work, head);
  const bool biased = ScoreBias::any(args);

  float top[kF32Rows], sum[kF32Rows], rescale[kF32Rows], out[kF32Rows][kF32Columns] = {};
#pragma unroll
  for (int r = 0; r < kF32Rows; ++r) top[r] = -INFINITY, sum[r] = 0.0f;
  copy_rows(q, dim, args.q, work.q_row + first, args.q_row, head * args.q_head, work.rows - first,
            static_cast<int>(kAttnF32Rows), dim);
  for (int key = 0; key < work.keys; key += kF32Keys) {
    const int keys = smaller(kF32Keys, work.keys - key);
    __syncthreads();  // nobody reads the keys before these any more
    copy_rows(k, stride, args.k, work.k_row + key, args.k_row, head * args.k_head, keys, kF32Keys,
              dim);
    copy_rows(v, stride, args.v, work.k_row + key, args.v_row, head * args.v_head, keys, kF32Keys,
              dim);
    __syncthreads();
    float scores[kF32Rows] = {};
    for (int d = 0; d < dim;
         d += 4) {  // four at a time: the stride keeps lanes off each other's banks
      const float4 x = *reinterpret_cast<const float4*>(k + lane * stride + d);
#pragma unroll
      for (int r = 0; r < kF32Rows; ++r) {
        const float4 y = *reinterpret_cast<const float4*>(q + (warp_row + r) * dim + d);
        scores[r] = fmaf(y.x, x.x, scores[r]);
        scores[r] = fmaf(y.y, x.y, scores[r]);
        scores[r] = fmaf(y.z, x.z, scores[r]);
        scores[r] = fmaf(y.w, x.w, scores[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kF32Rows; ++r) {
      float score = multiply_rn(scores[r], args.scale);
      if (biased && lane < keys) {
        score = bias.apply(score, work.place + first + warp_row + r, key + lane);
      }
      if (lane >= keys) score = -INFINITY;
      const float top_now = fmaxf(top[r], warp_max(score));
      const float shift = top_now == -INFINITY ? 0.0f : top_now;
      const float weight = expf(score - shift);
      rescale[r] = expf(top[r] - shift);
      sum[r] = sum[r] * rescale[r] + sum_over_warp(weight);
      top[r] = top_now;
      weights[r * kF32Keys + lane] = weight;
    }
    __syncwarp();  // a lane needs the weights of all keys
    // These keys are added up by themselves and then once to those before: one chain over all keys
    // would round as often as there are keys. Past the last key weights and values are 0.
#pragma unroll
    for (int c = 0; c < kF32Columns; ++c) {
      if (lane + 32 * c >= dim) continue;
      const float* values = v + lane + 32 * c;
      float part[kF32Rows] = {};
      for (int j = 0; j < keys; j += 4) {
        const float x[4] = {values[j * stride], values[(j + 1) * stride], values[(j + 2) * stride],
                            values[(j + 3) * stride]};
#pragma unroll
        for (int r = 0; r < kF32Rows; ++r) {
          const float4 w = *reinterpret_cast<const float4*>(weights + r * kF32Keys + j);
          part[r] = fmaf(w.x, x[0], part[r]);
          part[r] = fmaf(w.y, x[1], part[r]);
          part[r] = fmaf(w.z, x[2], part[r]);
          part[r] = fmaf(w.w, x[3], part[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kF32Rows; ++r) out[r][c] = fmaf(out[r][c], rescale[r], part[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kF32Rows; ++r) {
    const int row = first + warp_row + r;
    if (row >= work.rows) continue;
    const float inverse = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
    float* to =
        static_cast<float*>(args.out) + (work.q_row + row) * args.out_row + head * args.out_head;
#pragma unroll
    for (int c = 0; c < kF32Columns; ++c) {
      if (lane + 32 * c < dim) to[lane + 32 * c] = out[r][c] * inverse;
    }
    if (lane == 0) {
      const float shift = top[r] == -INFINITY ? 0.0f : top[r];
      args.lse[head * args.rows_q + work.q_row + row] = shift + logf(sum[r]);
    }
  }
  __syncthreads();  // the next rows take over the memory
}

static __global__ void __launch_bounds__(kAttnThreads, 3)
    attn_varlen_f32_kernel(const __grid_constant__ AttnVarlenArgs args) {
  const AttnList list(args);
  const int index = blockIdx.x;
  if (index >= list.count()) return;
  const AttnWork work = list.at(args, index);
  for (int h = 0; h < work.heads; ++h) {
    for (int first = 0; first < work.rows; first += static_cast<int>(kAttnF32Rows)) {
      attend_f32(args, work, work.head + h, first);
    }
  }
}

}  // namespace cuda
}  // namespace filbert
