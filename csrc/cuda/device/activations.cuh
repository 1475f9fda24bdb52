// Activations of a number. T is what the result is rounded to.
#pragma once

#include "args/activation.h"
#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

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

// x sigmoid(x).
template <typename T>
__device__ __forceinline__ float silu(float x) {
  const float e = Arithmetic<T>::exp(-fabsf(x));
  return x * (x > 0.0f ? 1.0f : e) * Arithmetic<T>::reciprocal(e + 1.0f);
}

template <typename T>
__device__ __forceinline__ float activated(float x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return gelu_erf<T>(x);
    case Activation::kGeluTanh:
      return gelu_tanh<T>(x);
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;  // a NaN stays one
    case Activation::kSilu:
      return silu<T>(x);
    default:
      return x;
  }
}

}  // namespace cuda
}  // namespace filbert
