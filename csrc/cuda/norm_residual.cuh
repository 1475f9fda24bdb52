// LayerNorm(x + bias + residual): memory is read once and written once.
//
// Rows of up to 1024 values: a warp holds a row in registers. Where everything is aligned it is
// loaded 16 bytes at a time, and all of it before the first sum, so that a row waits for memory
// once (norm_residual_kernel); else one by one, to the same bits (norm_residual_unaligned_kernel).
// Wider rows: a block, which reads its row three times, the second and third time from a cache
// (norm_residual_wide_kernel). Statistics are float32; the variance is taken about the mean, and
// the mean is corrected by what its own rounding left.
#pragma once

#include "args/norm_residual.h"
#include "cuda/device/quantize.cuh"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kNormWarps = 4;      // rows of a block of the first two kernels
constexpr int kNormThreads = 256;  // of a row's block in the third

// Blocks on a multiprocessor at once, which leaves each thread the registers for a row and all that
// is added to it.
template <typename T, int kPieces>
constexpr int kNormBlocks = sizeof(T) == 4 ? 2
                            : kPieces < 4  ? 4
                                           : 3;

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

// The sums a row's statistics come from, over the lane's values. Both kernels below add in one
// order.
struct LaneSums {
  float sum = 0.0f, squares = 0.0f, deviations = 0.0f;

  __device__ __forceinline__ void add(float value) { sum += value; }
  __device__ __forceinline__ void add_about(float mean, float value) {
    const float d = value - mean;
    squares = fmaf(d, d, squares);
    deviations += d;
  }
  __device__ __forceinline__ float mean(float width) const { return sum_over_warp(sum) / width; }
  __device__ __forceinline__ Moments moments_about(float mean, float width, float eps) const {
    return moments(mean, sum_over_warp(squares), sum_over_warp(deviations), width, eps);
  }
};

__device__ __forceinline__ float normalised(float value, const Moments& m, float weight,
                                            float beta) {
  return fmaf(multiply_rn(value - m.mean, m.rstd), weight, beta);
}

// Width: a multiple of 8, at most kPieces * 256. kCodes: codes of the results are written too.
template <typename T, int kPieces, bool kCodes>
__global__ void __launch_bounds__(32 * kNormWarps, kNormBlocks<T, kPieces>)
    norm_residual_kernel(const __grid_constant__ NormResidualArgs args) {
  const int lane = threadIdx.x % 32, width = static_cast<int>(args.width);
  const int64_t warps = int64_t{gridDim.x} * kNormWarps;
  int at[kPieces];  // a lane past the end of the row reads its start and writes nothing
  bool inside[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    at[p] = (p * 32 + lane) * kEight;
    inside[p] = at[p] < width;
    if (!inside[p]) at[p] = 0;
  }
  Eight<T> weight[kPieces], beta[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) {
    weight[p].load(static_cast<const T*>(args.weight) + at[p]);
    beta[p].load(static_cast<const T*>(args.beta) + at[p]);
  }
  for (int64_t row = blockIdx.x * kNormWarps + threadIdx.x / 32; row < args.rows; row += warps) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    Eight<T> loaded[kPieces], bias[kPieces], residual[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) loaded[p].load(x + at[p]);
    if (args.residual) {
      const T* from = static_cast<const T*>(args.residual) + row * args.residual_row;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) residual[p].load(from + at[p]);
    }
    if (args.bias) {
      const T* from = static_cast<const T*>(args.bias);
#pragma unroll
      for (int p = 0; p < kPieces; ++p) bias[p].load(from + at[p]);
    }
    float values[kPieces][kEight];
    LaneSums sums;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        values[p][i] = loaded[p][i];
        if (args.bias) values[p][i] += bias[p][i];
        if (args.residual) values[p][i] += residual[p][i];
        if (inside[p]) sums.add(values[p][i]);
      }
    }
    const float mean = sums.mean(width);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if (inside[p]) sums.add_about(mean, values[p][i]);
      }
    }
    const Moments m = sums.moments_about(mean, width, args.eps);
    T* out = static_cast<T*>(args.out) + row * args.out_row;
    RowRange range;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        values[p][i] = normalised(values[p][i], m, weight[p][i], beta[p][i]);
        if (kCodes && inside[p]) range.add(values[p][i]);
      }
      if (inside[p]) store_eight(out + at[p], values[p]);
    }
    if constexpr (kCodes) {
      const RowCodes codes(args.codes, row, range, lane);
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          if (inside[p]) codes.write(at[p] + i, values[p][i]);
        }
      }
    }
  }
}

// Width: at most 1024; any alignment.
template <typename T, bool kCodes>
__global__ void __launch_bounds__(32 * kNormWarps)
    norm_residual_unaligned_kernel(const __grid_constant__ NormResidualArgs args) {
  constexpr int kPieces = 4;
  const int lane = threadIdx.x % 32, width = static_cast<int>(args.width);
  const T* bias = static_cast<const T*>(args.bias);
  const T* weight = static_cast<const T*>(args.weight);
  const T* beta = static_cast<const T*>(args.beta);
  const int64_t warps = int64_t{gridDim.x} * kNormWarps;
  for (int64_t row = blockIdx.x * kNormWarps + threadIdx.x / 32; row < args.rows; row += warps) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    const T* residual =
        args.residual ? static_cast<const T*>(args.residual) + row * args.residual_row : nullptr;
    float values[kPieces][kEight];
    LaneSums sums;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        const int at = (p * 32 + lane) * kEight + i;
        if (at >= width) continue;
        values[p][i] = to_float(x[at]);
        if (bias) values[p][i] += to_float(bias[at]);
        if (residual) values[p][i] += to_float(residual[at]);
        sums.add(values[p][i]);
      }
    }
    const float mean = sums.mean(width);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        if ((p * 32 + lane) * kEight + i < width) sums.add_about(mean, values[p][i]);
      }
    }
    const Moments m = sums.moments_about(mean, width, args.eps);
    T* out = static_cast<T*>(args.out) + row * args.out_row;
    RowRange range;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
        const int at = (p * 32 + lane) * kEight + i;
        if (at >= width) continue;
        values[p][i] = normalised(values[p][i], m, to_float(weight[at]), to_float(beta[at]));
        if (kCodes) range.add(values[p][i]);
        out[at] = from_float<T>(values[p][i]);
      }
    }
    if constexpr (kCodes) {
      const RowCodes codes(args.codes, row, range, lane);
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
          const int at = (p * 32 + lane) * kEight + i;
          if (at < width) codes.write(at, values[p][i]);
        }
      }
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

// The range of the whole block's values, in every thread. `scratch` holds two floats for each warp.
__device__ __forceinline__ RowRange range_over_block(RowRange range, float* scratch) {
  constexpr int kWarps = kNormThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  range.over_warp();
  __syncthreads();  // what lay there has been read
  if (lane == 0) {
    scratch[warp] = range.bad() ? NAN : range.low;
    scratch[kWarps + warp] = range.high;
  }
  __syncthreads();
  RowRange all;
  for (int w = 0; w < kWarps; ++w) all.add(scratch[w]), all.add(scratch[kWarps + w]);
  return all;
}

template <typename T, bool kCodes>
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
    const auto result = [&](int64_t i) {
      return normalised(value(i), m, to_float(weight[i]), to_float(beta[i]));
    };
    // Codes come first: the results may take the place of x.
    if constexpr (kCodes) {
      RowRange range;
      for (int64_t i = threadIdx.x; i < args.width; i += kNormThreads) range.add(result(i));
      const RowCodes codes(args.codes, row, range_over_block(range, scratch), threadIdx.x);
      for (int64_t i = threadIdx.x; i < args.width; i += kNormThreads) codes.write(i, result(i));
    }
    for (int64_t i = threadIdx.x; i < args.width; i += kNormThreads) {
      out[i] = from_float<T>(result(i));
    }
  }
}

}  // namespace cuda
}  // namespace filbert
