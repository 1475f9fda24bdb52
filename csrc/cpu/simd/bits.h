// Bit operations over the vector layer: population counts, and lanes to bits.
#pragma once

#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

FILBERT_INLINE VecU load(const uint32_t* p) { return *reinterpret_cast<const VecUUnaligned*>(p); }
FILBERT_INLINE VecI load(const int32_t* p) {
  return (VecI) * reinterpret_cast<const VecUUnaligned*>(p);
}
FILBERT_INLINE void store(uint32_t* p, VecU v) { *reinterpret_cast<VecUUnaligned*>(p) = v; }
FILBERT_INLINE void store(int32_t* p, VecI v) { *reinterpret_cast<VecUUnaligned*>(p) = (VecU)v; }
FILBERT_INLINE VecI broadcast(int32_t s) { return s - VecI{}; }

// The number of ones in each lane.
FILBERT_INLINE VecI popcount(VecU v) {
#if defined(__AVX512VPOPCNTDQ__)
  return (VecI)_mm512_popcnt_epi32((__m512i)v);
#elif FILBERT_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i counts = _mm512_maskz_broadcast_i32x4(
      0xffff, _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m512i low = _mm512_and_si512((__m512i)v, nibble);
  const __m512i high = _mm512_and_si512(_mm512_srli_epi16((__m512i)v, 4), nibble);
  const __m512i bytes =
      _mm512_add_epi8(_mm512_shuffle_epi8(counts, low), _mm512_shuffle_epi8(counts, high));
  return (VecI)_mm512_madd_epi16(_mm512_maddubs_epi16(bytes, _mm512_set1_epi8(1)),
                                 _mm512_set1_epi16(1));
#elif FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi8(1);
  const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                          0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_and_si256((__m256i)v, nibble);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16((__m256i)v, 4), nibble);
  const __m256i bytes =
      _mm256_add_epi8(_mm256_shuffle_epi8(counts, low), _mm256_shuffle_epi8(counts, high));
  return (VecI)_mm256_madd_epi16(_mm256_maddubs_epi16(bytes, ones), _mm256_set1_epi16(1));
#else
  v = v - ((v >> 1) & 0x55555555u);
  v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
  v = (v + (v >> 4)) & 0x0f0f0f0fu;
  v = v + (v >> 8);
  return (VecI)((v + (v >> 16)) & 0x3fu);
#endif
}

// Bit i is whether lane i is negative; lanes of a comparison are -1 or 0.
FILBERT_INLINE uint32_t sign_bits(VecI v) {
#if FILBERT_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)v);
#elif FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)v));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (static_cast<uint32_t>(v[i]) >> 31) << i;
  return bits;
#endif
}

// One word from a function of 32 lanes' worth of vectors: part(i) is the vector of lanes from
// i * kLanes on, negative where the bit is 1.
template <typename Part>
FILBERT_INLINE uint32_t word_of(Part&& part) {
  uint32_t word = 0;
  for (int i = 0; i < 32 / kLanes; ++i) word |= sign_bits(part(i)) << (i * kLanes % 32);
  return word;
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
