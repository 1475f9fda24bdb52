// GELU(x + bias), in place: eight values a thread where they are aligned, else one.
#pragma once

#include "args/bias_gelu.h"
#include "cuda/device/activations.cuh"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kGeluThreads = 256;

template <typename T, bool kTanh>
__device__ __forceinline__ float gelu(float x) {
  return kTanh ? gelu_tanh<T>(x) : gelu_erf<T>(x);
}

template <typename T, bool kTanh>
__global__ void __launch_bounds__(kGeluThreads)
    bias_gelu_kernel(const __grid_constant__ BiasGeluArgs args) {
  T* x = static_cast<T*>(args.x);
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t pieces = args.rows * args.width / kEight;
  const int64_t row_pieces = args.width / kEight;
  const int64_t step = int64_t{gridDim.x} * kGeluThreads;
  for (int64_t i = int64_t{blockIdx.x} * kGeluThreads + threadIdx.x; i < pieces; i += step) {
    Eight<T> loaded, more{};
    loaded.load(x + i * kEight);
    if (bias) more.load(bias + i % row_pieces * kEight);
    float values[kEight];
#pragma unroll
    for (int j = 0; j < kEight; ++j) values[j] = gelu<T, kTanh>(loaded[j] + more[j]);
    store_eight(x + i * kEight, values);
  }
}

template <typename T, bool kTanh>
__global__ void __launch_bounds__(kGeluThreads)
    bias_gelu_any_kernel(const __grid_constant__ BiasGeluArgs args) {
  T* x = static_cast<T*>(args.x);
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t values = args.rows * args.width;
  const int64_t step = int64_t{gridDim.x} * kGeluThreads;
  for (int64_t i = int64_t{blockIdx.x} * kGeluThreads + threadIdx.x; i < values; i += step) {
    const float s = to_float(x[i]) + (bias ? to_float(bias[i % args.width]) : 0.0f);
    x[i] = from_float<T>(gelu<T, kTanh>(s));
  }
}

}  // namespace cuda
}  // namespace filbert
