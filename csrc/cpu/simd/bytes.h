// Vectors of bytes: sums of products by four and by two, and numbers to bytes.
#pragma once

#include "cpu/simd/bits.h"
#include "cpu/simd/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Whether four products of bytes are summed by one instruction.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define FILBERT_VNNI 1
#else
#define FILBERT_VNNI 0
#endif

namespace filbert {
namespace FILBERT_ISA {
namespace {

typedef int8_t VecB __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));
typedef uint8_t VecUB __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));
typedef int16_t VecS __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));

FILBERT_INLINE VecU load_bytes(const void* p) { return *reinterpret_cast<const VecUUnaligned*>(p); }
FILBERT_INLINE void store_bytes(void* p, VecU v) { *reinterpret_cast<VecUUnaligned*>(p) = v; }

// In each lane: sum + a0 w0 + a1 w1 + a2 w2 + a3 w3, of unsigned bytes a and signed bytes w. Exact;
// a sum beyond int32 wraps.
FILBERT_INLINE VecI dot_quads(VecI sum, VecU a, VecU w) {
#if defined(__AVX512VNNI__) && FILBERT_VECTOR_BYTES == 64
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
#elif defined(__AVXVNNI__) && FILBERT_VECTOR_BYTES == 32
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)w);
#else
  const VecI bytes = (VecI)w;
  sum += (VecI)(a & 255) * (bytes << 24 >> 24);
  sum += (VecI)(a >> 8 & 255) * (bytes << 16 >> 24);
  sum += (VecI)(a >> 16 & 255) * (bytes << 8 >> 24);
  return sum + (VecI)(a >> 24) * (bytes >> 24);
#endif
}

// In each lane a0 w0 + a1 w1, of signed 16-bit halves.
FILBERT_INLINE VecI multiply_pairs(VecI a, VecI w) {
#if FILBERT_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  return (VecI)_mm512_madd_epi16((__m512i)a, (__m512i)w);
#elif FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (VecI)_mm256_madd_epi16((__m256i)a, (__m256i)w);
#elif FILBERT_VECTOR_BYTES == 16 && defined(__SSE2__)
  return (VecI)_mm_madd_epi16((__m128i)a, (__m128i)w);
#else
  return (a << 16 >> 16) * (w << 16 >> 16) + (a >> 16) * (w >> 16);
#endif
}

#if defined(__AVX2__) && FILBERT_VECTOR_BYTES >= 32
#define FILBERT_BYTE_CHAINS 1
// In each 16-bit half a0 w0 + a1 w1, of unsigned bytes a and signed bytes w.
// Careful: it saturates where that is beyond int16. Nothing that calls it may let that happen.
FILBERT_INLINE VecS multiply_bytes(VecU a, VecU w) {
#if FILBERT_VECTOR_BYTES == 64
  return (VecS)_mm512_maddubs_epi16((__m512i)a, (__m512i)w);
#else
  return (VecS)_mm256_maddubs_epi16((__m256i)a, (__m256i)w);
#endif
}
#else
#define FILBERT_BYTE_CHAINS 0
#endif

// Lanes from 0 to 255 of four vectors to 4 * kLanes bytes.
FILBERT_INLINE void store_as_bytes(uint8_t* p, const VecI (&v)[4]) {
#if FILBERT_VECTOR_BYTES == 64 && defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * i),
                     _mm512_maskz_cvtepi32_epi8(static_cast<__mmask16>(-1), (__m512i)v[i]));
  }
#elif FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i low = _mm256_packus_epi32((__m256i)v[0], (__m256i)v[1]);
  const __m256i high = _mm256_packus_epi32((__m256i)v[2], (__m256i)v[3]);
  const __m256i bytes = _mm256_packus_epi16(low, high);  // by 4: 0 2 4 6 of each half, 1 3 5 7
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
#else
  for (int i = 0; i < 4; ++i) {
    for (int l = 0; l < kLanes; ++l) p[i * kLanes + l] = static_cast<uint8_t>(v[i][l]);
  }
#endif
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
