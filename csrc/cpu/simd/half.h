// float16 to float32.
#pragma once

#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

// kLanes float16, each exactly: subnormals, infinities and NaN too.
FILBERT_INLINE VecF load_half(const uint16_t* p) {
#if FILBERT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (VecF)_mm512_maskz_cvtph_ps(static_cast<__mmask16>(-1), half);
#elif FILBERT_VECTOR_BYTES == 32 && defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const VecU half = __builtin_convertvector(*reinterpret_cast<const VecHUnaligned*>(p), VecU);
  // Exponent and mantissa at their places in a float32, whose exponent is 112 too small.
  const VecF scaled = (VecF)((half & 0x7fffu) << 13) * 0x1p112f;
  const VecI beyond = (half & 0x7c00u) == 0x7c00u;  // infinity or NaN: all ones there too
  return (VecF)((VecU)scaled | ((VecU)beyond & 0x7f800000u) | (half & 0x8000u) << 16);
#endif
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
