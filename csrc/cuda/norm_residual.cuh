// LayerNorm(x + bias + residual): memory is read once and written once.
//
// Rows of up to 1024 values: a warp holds a row in registers (norm_residual_kernel), loaded 16
// bytes at a time where everything is aligned, else one by one, to the same bits. Wider rows: a
// block, which reads its row three times, the second and third time from a cache
// (norm_residual_wide_kernel). Statistics are float32; the variance is taken about the mean, and
// the mean is corrected by what its own rounding left.
#pragma once

#include "args/norm_residual.h"
#include "cuda/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kNormWarps = 4;  // rows of a block of norm_residual_kernel
// Blocks on a multiprocessor at once: 72 registers a thread. Left to itself ptxas aims for more,
// and spills.
constexpr int kNormBlocks = 7;
constexpr int kNormThreads = 256;  // of a row's block in norm_residual_wide_kernel

struct Moments {
  float mean;
  float rstd;
};

// `squares` and `deviations` are sums over the row about `mean`.
__device__ __forceinline__ Moments moments(float mean, float squares, float deviations, float width,
                                           float eps) {
  const float shift = deviations / width;
  const float about_first = squares / width;
  float variance = about_first;
  if (about_first != INFINITY) variance = fmaxf(about_first - shift * shift, 0.0f);
  if (about_first != about_first) variance = about_first;  // fmaxf drops a NaN
  return {mean + shift, 1.0f / sqrtf(variance + eps)};
}

// Width: at most kPieces * 256. kAligned: every row of every operand lies in whole pieces of 16
// bytes.
template <typename T, int kPieces, bool kAligned>
__global__ void __launch_bounds__(32 * kNormWarps, kNormBlocks)
    norm_residual_kernel(const __grid_constant__ NormResidualArgs args) {
  const int lane = threadIdx.x % 32, width = static_cast<int>(args.width);
  const T* bias = static_cast<const T*>(args.bias);
  const T* weight = static_cast<const T*>(args.weight);
  const T* beta = static_cast<const T*>(args.beta);
  const int64_t warps = int64_t{gridDim.x} * kNormWarps;
  const auto load = [](float (&to)[kEight], const T* from, int n) {
    kAligned ? load_eight(to, from) : load_some(to, from, n);
  };
  for (int64_t row = blockIdx.x * kNormWarps + threadIdx.x / 32; row < args.rows; row += warps) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    const T* residual =
        args.residual ? static_cast<const T*>(args.residual) + row * args.residual_row : nullptr;
    float values[kPieces][kEight];
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int at = (p * 32 + lane) * kEight, n = width - at;  // eight of them, or the last n
      if (n <= 0) continue;
      float more[kEight];
      load(values[p], x + at, n);
      if (bias) {
        load(more, bias + at, n);
#pragma unroll
        for (int i = 0; i < kEight; ++i) values[p][i] += more[i];
      }
      if (residual) {
        load(more, residual + at, n);
#pragma unroll
        for (int i = 0; i < kEight; ++i) values[p][i] += more[i];
      }
#pragma unroll
      for (int i = 0; i < kEight; ++i) sum += values[p][i];
    }
    const float mean = sum_over_warp(sum) / width;
    float squares = 0.0f, deviations = 0.0f;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int n = width - (p * 32 + lane) * kEight;
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if (kAligned ? n > 0 : i < n) {
          const float d = values[p][i] - mean;
          squares = fmaf(d, d, squares);
          deviations += d;
        }
      }
    }
    const Moments m =
        moments(mean, sum_over_warp(squares), sum_over_warp(deviations), width, args.eps);
    T* out = static_cast<T*>(args.out) + row * args.out_row;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int at = (p * 32 + lane) * kEight, n = width - at;
      if (n <= 0) continue;
      float w[kEight], b[kEight];
      load(w, weight + at, n);
      load(b, beta + at, n);
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        w[i] = fmaf(multiply_rn(values[p][i] - m.mean, m.rstd), w[i], b[i]);
      }
      kAligned ? store_eight(out + at, w) : store_some(out + at, w, n);
    }
  }
}

// Sum over the block, the same in every thread. `scratch` holds a float for each warp.
__device__ __forceinline__ float sum_over_block(float x, float* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = sum_over_warp(x);
  __syncthreads();  // the last sum has been read
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < kNormThreads / 32; ++w) total += scratch[w];
  return total;
}

template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    norm_residual_wide_kernel(const __grid_constant__ NormResidualArgs args) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const T* bias = static_cast<const T*>(args.bias);
  const T* weight = static_cast<const T*>(args.weight);
  const T* beta = static_cast<const T*>(args.beta);
  const float width = static_cast<float>(args.width);
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    const T* residual =
        args.residual ? static_cast<const T*>(args.residual) + row * args.residual_row : nullptr;
    const auto value = [&](int64_t i) {
      float v = to_float(x[i]);
      if (bias) v += to_float(bias[i]);
      if (residual) v += to_float(residual[i]);
      return v;
    };
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < args.width; i += kNormThreads) sum += value(i);
    const float mean = sum_over_block(sum, scratch) / width;
    float squares = 0.0f, deviations = 0.0f;
    for (int64_t i = threadIdx.x; i < args.width; i += kNormThreads) {
      const float d = value(i) - mean;
      squares = fmaf(d, d, squares);
      deviations += d;
    }
    const float all_squares = sum_over_block(squares, scratch);
    const Moments m =
        moments(mean, all_squares, sum_over_block(deviations, scratch), width, args.eps);
    T* out = static_cast<T*>(args.out) + row * args.out_row;
    for (int64_t i = threadIdx.x; i < args.width; i += kNormThreads) {
      out[i] = from_float<T>(
          fmaf(multiply_rn(value(i) - m.mean, m.rstd), to_float(weight[i]), to_float(beta[i])));
    }
  }
}

}  // namespace cuda
}  // namespace filbert
