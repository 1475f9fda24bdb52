// The ways to multiply: what an element of an operand is, and the one instruction of a step.
#pragma once

#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

// One float32 per step of the inner dimension.
struct Single {
  using Element = float;
  using Vector = VecF;
  static constexpr int kSteps = 1;  // inner elements per Element
  static FILBERT_INLINE Vector spread(Element a) { return broadcast(a); }
  static FILBERT_INLINE Vector read(const Element* b) { return load(b); }
  static FILBERT_INLINE VecF multiply_add(Vector a, Vector b, VecF sum) { return a * b + sum; }
};

#if FILBERT_BF16_PAIRS
// Two bfloat16 per step, the even inner index in the low half.
struct Pair {
  using Element = uint32_t;
  using Vector = VecU;
  static constexpr int kSteps = 2;
  static FILBERT_INLINE Vector spread(Element a) { return broadcast(a); }
  static FILBERT_INLINE Vector read(const Element* b) {
    return *reinterpret_cast<const VecUUnaligned*>(b);
  }
  static FILBERT_INLINE VecF multiply_add(Vector a, Vector b, VecF sum) {
    return dot_pairs(sum, a, b);
  }
};
#endif

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
