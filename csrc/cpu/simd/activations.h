// Activations of a vector of numbers.
#pragma once

#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

// x * Phi(x). The tail Phi(-|x|) = erfc(z) / 2, z = |x| / sqrt(2), is exp(-z^2) times a polynomial
// in 1 / (1 + 0.3 z), fitted to a relative error of 2e-8 on z <= 10. The tail itself is computed,
// never 1 - (1 - tail), so small results keep their digits where x * (1 + erf(z)) / 2 loses them.
FILBERT_INLINE VecF gelu_erf(VecF x) {
  constexpr float kHalfSqrt2 = 0.707106781f;
  constexpr float kFar = 20.0f;  // the tail is 0 from here on; keeps inf * 0 out of the sum
  const VecF magnitude = x < 0.0f ? -x : x;
  const VecF a = magnitude > kFar ? broadcast(kFar) : magnitude;
  const VecF t = 1.0f / (a * (0.3f * kHalfSqrt2) + 1.0f);
  VecF p = t * -0.129522771f + 0.485562569f;
  p = p * t + -0.512276786f;
  p = p * t + 0.547718568f;
  p = p * t + -0.0946497393f;
  p = p * t + 0.214925649f;
  p = p * t + 0.148339272f;
  p = p * t + 0.170715213f;
  p = p * t + 0.169188006f;
  const VecF tail = 0.5f * a * (p * t) * exp_nonpositive(a * a * -0.5f);
  return x > 0.0f ? x - tail : -tail;
}

// x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the same as x (1 + tanh u) / 2, without 1
// - 1.
FILBERT_INLINE VecF gelu_tanh(VecF x) {
  constexpr float kTwoSqrt2OverPi = 1.59576912f;
  const VecF u2 = kTwoSqrt2OverPi * x * (x * x * 0.044715f + 1.0f);
  const VecF e = exp_nonpositive(u2 > 0.0f ? -u2 : u2);
  return x * (u2 > 0.0f ? broadcast(1.0f) : e) / (e + 1.0f);
}

// A NaN stays a NaN.
FILBERT_INLINE VecF relu(VecF x) { return x < 0.0f ? VecF{} : x; }

// x * sigmoid(x).
FILBERT_INLINE VecF silu(VecF x) {
  const VecF e = exp_nonpositive(x > 0.0f ? -x : x);
  return x * (x > 0.0f ? broadcast(1.0f) : e) / (e + 1.0f);
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
