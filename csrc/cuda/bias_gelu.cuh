// GELU(x + bias), in place: eight values a thread where they are aligned, else one.
#pragma once

#include "args/bias_gelu.h"
#include "cuda/device/rows.cuh"

namespace filbert {
namespace cuda {

constexpr int kGeluThreads = 256;

// 1 / x and e^x: to the last digit for float32, and with hardware's approximations (relative error
// below 1e-6) where the result is rounded to 16 bits anyway, since arithmetic is what bounds the
// kernel.
template <typename T>
struct Arithmetic {
  static __device__ __forceinline__ float reciprocal(float x) { return reciprocal_approx(x); }
  static __device__ __forceinline__ float exp(float x) {
    return exp2_approx(x * 1.44269504088896341f);
  }
};
template <>
struct Arithmetic<float> {
  static __device__ __forceinline__ float reciprocal(float x) { return 1.0f / x; }
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
};

// x Phi(x). The tail Phi(-|x|) is exp(-x^2 / 2) times a polynomial, as on the CPU: computed itself
// and never as 1 - (1 - tail), so that small results keep their digits.
template <typename T>
__device__ __forceinline__ float gelu_erf(float x) {
  constexpr float kHalfSqrt2 = 0.707106781f;
  constexpr float kFar = 20.0f;  // the tail is 0 from here on; keeps inf * 0 out of the sum
  const float magnitude = fabsf(x);
  const float a = magnitude > kFar ? kFar : magnitude;  // a NaN stays one
  const float t = Arithmetic<T>::reciprocal(fmaf(a, 0.3f * kHalfSqrt2, 1.0f));
  float p = fmaf(t, -0.129522771f, 0.485562569f);
  p = fmaf(p, t, -0.512276786f);
  p = fmaf(p, t, 0.547718568f);
  p = fmaf(p, t, -0.0946497393f);
  p = fmaf(p, t, 0.214925649f);
  p = fmaf(p, t, 0.148339272f);
  p = fmaf(p, t, 0.170715213f);
  p = fmaf(p, t, 0.169188006f);
  const float tail = 0.5f * a * (p * t) * Arithmetic<T>::exp(a * a * -0.5f);
  return x > 0.0f ? x - tail : -tail;
}

// x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh u) / 2 without its 1 - 1.
template <typename T>
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kTwoSqrt2OverPi = 1.59576912f;
  const float u2 = kTwoSqrt2OverPi * x * fmaf(x * x, 0.044715f, 1.0f);
  const float e = Arithmetic<T>::exp(-fabsf(u2));
  return x * (u2 > 0.0f ? 1.0f : e) * Arithmetic<T>::reciprocal(e + 1.0f);
}

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
