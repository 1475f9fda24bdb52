// The vector layer: a handful of operations over GCC/Clang vector types.
//
// The same source becomes SSE, AVX2, AVX-512 or another processor's vectors, by compiler flags
// alone; intrinsics appear only where a processor has an instruction the language cannot name.
// Everything is in an anonymous namespace: copies of different instruction sets must never be
// merged by the linker. For the same reason kernel files use no templates of the standard library.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FILBERT_INLINE inline __attribute__((always_inline))

// An operand of asm that is read and written, in a vector register.
#if defined(__AVX512F__)
#define FILBERT_VECTOR_REGISTER(v) "+v"(v)
#elif defined(__aarch64__)
#define FILBERT_VECTOR_REGISTER(v) "+w"(v)
#else
#define FILBERT_VECTOR_REGISTER(v) "+x"(v)
#endif

#if !defined(FILBERT_VECTOR_BYTES)
#if defined(__AVX512F__)
#define FILBERT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FILBERT_VECTOR_BYTES 32
#else
#define FILBERT_VECTOR_BYTES 16
#endif
#endif

#if !defined(FILBERT_BF16_PAIRS)
#if defined(__AVX512BF16__)
#define FILBERT_BF16_PAIRS 1
#else
#define FILBERT_BF16_PAIRS 0
#endif
#endif

// A register tile of rows x vectors that fills the register file and leaves room for operands:
// 32 vector registers with AVX-512 and elsewhere than on x86, 16 on older x86.
#if !defined(FILBERT_TILE_ROWS)
#if defined(__AVX512F__) || !defined(__x86_64__)
#define FILBERT_TILE_ROWS 12
#else
#define FILBERT_TILE_ROWS 6
#endif
#endif

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int kLanes = FILBERT_VECTOR_BYTES / 4;  // float32 lanes
constexpr int kTileRows = FILBERT_TILE_ROWS;
constexpr int kTileVectors = 2;
constexpr int kTileCols = kTileVectors * kLanes;

typedef float VecF __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));
typedef int32_t VecI __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));
typedef uint32_t VecU __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));
typedef uint16_t VecH __attribute__((vector_size(FILBERT_VECTOR_BYTES / 2), may_alias));
typedef float VecFUnaligned
    __attribute__((vector_size(FILBERT_VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t VecUUnaligned
    __attribute__((vector_size(FILBERT_VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t VecHUnaligned
    __attribute__((vector_size(FILBERT_VECTOR_BYTES / 2), aligned(2), may_alias));

// bfloat16 is the upper half of a float32; `bf16` is a distinct type so that overloads see it.
struct bf16 {
  uint16_t bits;
};

FILBERT_INLINE VecF broadcast(float s) { return s - VecF{}; }
FILBERT_INLINE VecU broadcast(uint32_t s) { return s - VecU{}; }

FILBERT_INLINE VecF load(const float* p) { return *reinterpret_cast<const VecFUnaligned*>(p); }
FILBERT_INLINE void store(float* p, VecF v) { *reinterpret_cast<VecFUnaligned*>(p) = v; }

FILBERT_INLINE VecF load(const bf16* p) {
#if FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  const VecH half = *reinterpret_cast<const VecHUnaligned*>(p);
  return (VecF)(__builtin_convertvector(half, VecU) << 16);
#endif
}

// Rounds to nearest, ties to even; a NaN stays a NaN.
FILBERT_INLINE VecH to_bf16(VecF v) {
#if FILBERT_VECTOR_BYTES == 64 && defined(__AVX512BF16__)
  return (VecH)_mm512_cvtneps_pbh((__m512)v);
#else
  const VecU bits = (VecU)v;
  const VecU rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecU quiet = bits | 0x400000;
  const VecU kept = (VecU)(v == v ? (VecI)rounded : (VecI)quiet) >> 16;
#if FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);
  return (VecH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(kept, VecH);
#endif
#endif
}

FILBERT_INLINE void store(bf16* p, VecF v) { *reinterpret_cast<VecHUnaligned*>(p) = to_bf16(v); }

// The first n lanes, n < kLanes; the others read as zero and are not written. Memory past them is
// not touched: masked loads do not fault there.
template <typename T>
FILBERT_INLINE VecF load_first(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
#if FILBERT_VECTOR_BYTES == 64 && defined(__AVX512F__)
FILBERT_INLINE VecF load_first(const float* p, int64_t n) {
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
FILBERT_INLINE VecF load_first(const bf16* p, int64_t n) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  return (VecF)(__builtin_convertvector((VecH)half, VecU) << 16);
}
#elif FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)
FILBERT_INLINE VecF load_first(const float* p, int64_t n) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i lanes = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), index);
  return (VecF)_mm256_maskload_ps(p, lanes);
}
#endif

template <typename T>
FILBERT_INLINE void store_first(T* p, VecF v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

FILBERT_INLINE float to_float(float s) { return s; }
FILBERT_INLINE float to_float(bf16 s) {
  const uint32_t bits = uint32_t{s.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// v rounded here and now: no part of a fused multiply-add, where there are such.
FILBERT_INLINE VecF rounded(VecF v) {
#if defined(__FMA__) || defined(__aarch64__)
  asm("" : FILBERT_VECTOR_REGISTER(v));
#endif
  return v;
}

FILBERT_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
FILBERT_INLINE VecF min(VecF a, VecF b) { return a < b ? a : b; }

FILBERT_INLINE VecI lane_index() {
  VecI index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

FILBERT_INLINE float reduce_add(VecF v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

FILBERT_INLINE float reduce_max(VecF v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// e^x for x <= 0: 0 below the normal range, NaN for NaN, within 1 unit in the last place or so.
// x = n ln2 + r with |r| <= ln2/2, and a polynomial for e^r fitted to float32's accuracy.
FILBERT_INLINE VecF exp_nonpositive(VecF x) {
  constexpr float kLog2E = 1.44269504088896341f;
  constexpr float kLn2Hi = 0.693359375f;
  constexpr float kLn2Lo = -2.12194440e-4f;
  constexpr float kShift =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  constexpr float kLowest = -87.33654f;  // ln of the smallest normal number
  const VecF clamped = x < kLowest ? broadcast(kLowest) : x;
  const VecF shifted = clamped * kLog2E + kShift;
  const VecF n = shifted - kShift;
  const VecF r = (clamped - n * kLn2Hi) - n * kLn2Lo;
  VecF p = r * 0.00138146130f + 0.00836870984f;
  p = p * r + 0.0416683874f;
  p = p * r + 0.166665207f;
  p = p * r + 0.499999935f;
  p = p * (r * r) + (r + 1.0f);
  const VecF power = (VecF)(((VecU)shifted << 23) + (127u << 23));
  const VecF result = p * power;
  return x < kLowest ? VecF{} : result;
}

#if FILBERT_BF16_PAIRS
// acc + a.even * b.even + a.odd * b.odd, over bfloat16 pairs held in 32-bit lanes.
FILBERT_INLINE VecF dot_pairs(VecF acc, VecU a, VecU b) {
#if defined(__AVX512BF16__)
  return (VecF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc = (VecF)(a & 0xffff0000u) * (VecF)(b & 0xffff0000u) + acc;
  return (VecF)(a << 16) * (VecF)(b << 16) + acc;
#endif
}
#endif

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
