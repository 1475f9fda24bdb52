// GELU(x + bias), in place: eight values a thread where they are aligned, else one.
#pragma once

#include "args/bias_gelu.h"
#include "cuda/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kGeluThreads = 256;

// x Phi(x). The tail Phi(-|x|) is exp(-x^2 / 2) times a polynomial, as on the CPU: computed itself
// and never as 1 - (1 - tail), so that small results keep their digits.
__device__ __forceinline__ float gelu_erf(float x) {
  constexpr float kHalfSqrt2 = 0.707106781f;
  constexpr float kFar = 20.0f;  // the tail is 0 from here on; keeps inf * 0 out of the sum
  const float magnitude = fabsf(x);
  const float a = magnitude > kFar ? kFar : magnitude;  // a NaN stays one
  const float t = 1.0f / fmaf(a, 0.3f * kHalfSqrt2, 1.0f);
  float p = fmaf(t, -0.129522771f, 0.485562569f);
  p = fmaf(p, t, -0.512276786f);
  p = fmaf(p, t, 0.547718568f);
  p = fmaf(p, t, -0.0946497393f);
  p = fmaf(p, t, 0.214925649f);
  p = fmaf(p, t, 0.148339272f);
  p = fmaf(p, t, 0.170715213f);
  p = fmaf(p, t, 0.169188006f);
  const float tail = 0.5f * a * (p * t) * expf(a * a * -0.5f);
  return x > 0.0f ? x - tail : -tail;
}

// x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh u) / 2 without its 1 - 1.
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kTwoSqrt2OverPi = 1.59576912f;
  const float u2 = kTwoSqrt2OverPi * x * fmaf(x * x, 0.044715f, 1.0f);
  const float e = expf(-fabsf(u2));
  return x * (u2 > 0.0f ? 1.0f : e) / (e + 1.0f);
}

template <typename T>
__global__ void __launch_bounds__(kGeluThreads)
    bias_gelu_kernel(const __grid_constant__ BiasGeluArgs args) {
  T* x = static_cast<T*>(args.x);
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t pieces = args.rows * args.width / kEight;
  const int64_t row_pieces = args.width / kEight;
  const int64_t step = int64_t{gridDim.x} * kGeluThreads;
  for (int64_t i = int64_t{blockIdx.x} * kGeluThreads + threadIdx.x; i < pieces; i += step) {
    float values[kEight], more[kEight] = {};
    load_eight(values, x + i * kEight);
    if (bias) load_eight(more, bias + i % row_pieces * kEight);
#pragma unroll
    for (int j = 0; j < kEight; ++j) {
      const float s = values[j] + more[j];
      values[j] = args.tanh ? gelu_tanh(s) : gelu_erf(s);
    }
    store_eight(x + i * kEight, values);
  }
}

template <typename T>
__global__ void __launch_bounds__(kGeluThreads)
    bias_gelu_any_kernel(const __grid_constant__ BiasGeluArgs args) {
  T* x = static_cast<T*>(args.x);
  const T* bias = static_cast<const T*>(args.bias);
  const int64_t values = args.rows * args.width;
  const int64_t step = int64_t{gridDim.x} * kGeluThreads;
  for (int64_t i = int64_t{blockIdx.x} * kGeluThreads + threadIdx.x; i < values; i += step) {
    const float s = to_float(x[i]) + (bias ? to_float(bias[i % args.width]) : 0.0f);
    x[i] = from_float<T>(args.tanh ? gelu_tanh(s) : gelu_erf(s));
  }
}

}  // namespace cuda
}  // namespace filbert
