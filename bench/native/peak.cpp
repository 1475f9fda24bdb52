// Loops that do nothing but the instruction whose peak is asked for, on registers alone.
//
// Each has as many independent chains as hide the instruction's latency. A loop is compiled for its
// own instruction set, so one library serves every processor: peak_run says 0 for what it lacks.
#include <cstdint>
#include <cstring>

#include <immintrin.h>

namespace {

// Chains of one operation. FMA has a latency of 4 cycles and starts 2 a cycle, so 8 at least.
constexpr int kChains = 10;

// A value that the compiler knows nothing of.
template <typename V>
inline __attribute__((always_inline)) void opaque(V& value) {
  asm volatile("" : "+v"(value));
}
inline __attribute__((always_inline)) void opaque(uint64_t& value) {
  asm volatile("" : "+r"(value));
}

// Runs `step` on all chains `rounds` times, and keeps the results alive. The chains are variables
// and no array, so that they are registers.
#define FILBERT_PEAK_STEP(c, step) c = step(c), opaque(c)
#define FILBERT_PEAK_LOOP(V, start, step)                                                        \
  V c0 = start, c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0, c8 = c0, c9 = c0; \
  for (int64_t r = 0; r < rounds; ++r) {                                                         \
    FILBERT_PEAK_STEP(c0, step), FILBERT_PEAK_STEP(c1, step), FILBERT_PEAK_STEP(c2, step);       \
    FILBERT_PEAK_STEP(c3, step), FILBERT_PEAK_STEP(c4, step), FILBERT_PEAK_STEP(c5, step);       \
    FILBERT_PEAK_STEP(c6, step), FILBERT_PEAK_STEP(c7, step), FILBERT_PEAK_STEP(c8, step);       \
    FILBERT_PEAK_STEP(c9, step);                                                                 \
  }

using Loop = int64_t (*)(int64_t rounds);  // says how many operations it did

// --- float32 multiply-adds; operations are floating-point operations, two to a multiply-add ---

int64_t fma_base(int64_t rounds) {
  __m128 a = _mm_set1_ps(0.5f), b = _mm_set1_ps(1.0f);
  opaque(a), opaque(b);
#define STEP(c) _mm_add_ps(_mm_mul_ps(c, a), b)
  FILBERT_PEAK_LOOP(__m128, b, STEP)
#undef STEP
  return rounds * kChains * 4 * 2;
}

#define FILBERT_AVX2 __attribute__((target("avx2,fma")))
#define FILBERT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

FILBERT_AVX2 int64_t fma_avx2(int64_t rounds) {
  __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
  opaque(a), opaque(b);
#define STEP(c) _mm256_fmadd_ps(c, a, b)
  FILBERT_PEAK_LOOP(__m256, b, STEP)
#undef STEP
  return rounds * kChains * 8 * 2;
}

FILBERT_AVX512 int64_t fma_avx512(int64_t rounds) {
  __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f);
  opaque(a), opaque(b);
#define STEP(c) _mm512_fmadd_ps(c, a, b)
  FILBERT_PEAK_LOOP(__m512, b, STEP)
#undef STEP
  return rounds * kChains * 16 * 2;
}

// --- bfloat16 pairs: two multiply-adds for each float32 of the sum ---

__attribute__((target("avx512f,avx512bf16"))) int64_t bf16_avx512(int64_t rounds) {
  __m512 start = _mm512_set1_ps(1.0f);
  opaque(start);
  __m512bh a, b;
  std::memcpy(&a, &start, sizeof(a));
  std::memcpy(&b, &start, sizeof(b));
#define STEP(c) _mm512_dpbf16_ps(c, a, b)
  FILBERT_PEAK_LOOP(__m512, start, STEP)
#undef STEP
  return rounds * kChains * 32 * 2;
}

// --- int8: products of unsigned and signed bytes, summed by four into int32 ---

FILBERT_AVX2 int64_t int8_avx2(int64_t rounds) {
  __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2), ones = _mm256_set1_epi16(1);
  opaque(a), opaque(b), opaque(ones);
#define STEP(c) \
  _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, _mm256_xor_si256(b, c)), ones))
  FILBERT_PEAK_LOOP(__m256i, b, STEP)
#undef STEP
  return rounds * kChains * 32 * 2;
}

__attribute__((target("avx512f,avx512vnni"))) int64_t int8_vnni(int64_t rounds) {
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  opaque(a), opaque(b);
#define STEP(c) _mm512_dpbusd_epi32(c, a, b)
  FILBERT_PEAK_LOOP(__m512i, b, STEP)
#undef STEP
  return rounds * kChains * 64 * 2;
}

// --- bits: AND, population count and sum; an operation is a multiply-add of two bits ---

#define STEP(c) c + static_cast<uint64_t>(__builtin_popcountll(c & mask))
int64_t bits_base(int64_t rounds) {
  uint64_t mask = 0x5555555555555555u;
  opaque(mask);
  FILBERT_PEAK_LOOP(uint64_t, mask, STEP)
  return rounds * kChains * 64;
}

__attribute__((target("popcnt"))) int64_t bits_popcnt(int64_t rounds) {
  uint64_t mask = 0x5555555555555555u;
  opaque(mask);
  FILBERT_PEAK_LOOP(uint64_t, mask, STEP)
  return rounds * kChains * 64;
}
#undef STEP

// Two lookups in a table of 16 counts for each byte, and a sum of bytes.
FILBERT_AVX2 inline __m256i counted(__m256i sum, __m256i mask, __m256i table, __m256i low) {
  const __m256i bits = _mm256_and_si256(sum, mask);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bits, 4), low);
  const __m256i counts = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(bits, low)),
                                         _mm256_shuffle_epi8(table, high));
  return _mm256_add_epi8(sum, counts);
}

FILBERT_AVX2 int64_t bits_avx2(int64_t rounds) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i low = _mm256_set1_epi8(15);
  __m256i mask = _mm256_set1_epi8(0x55);
  opaque(mask);
#define STEP(c) counted(c, mask, table, low)
  FILBERT_PEAK_LOOP(__m256i, mask, STEP)
#undef STEP
  return rounds * kChains * 256;
}

__attribute__((target("avx512f,avx512vpopcntdq"))) int64_t bits_vpopcnt(int64_t rounds) {
  __m512i mask = _mm512_set1_epi8(0x55);
  opaque(mask);
#define STEP(c) _mm512_add_epi32(c, _mm512_popcnt_epi32(_mm512_and_si512(c, mask)))
  FILBERT_PEAK_LOOP(__m512i, mask, STEP)
#undef STEP
  return rounds * kChains * 512;
}

// --- which loop ---

enum Kind { kFma, kBf16, kInt8, kBits };

// How wide the instruction set in use is: filbert's own names begin like this.
enum Width { kBase, kAvx2, kAvx512 };

Loop loop_of(int kind, int width) {
  __builtin_cpu_init();
  const bool avx2 =
      width >= kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = width >= kAvx512 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (kind) {
    case kFma:
      return avx512 ? fma_avx512 : avx2 ? fma_avx2 : fma_base;
    case kBf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") ? bf16_avx512 : nullptr;
    case kInt8:
      if (avx512 && __builtin_cpu_supports("avx512vnni")) return int8_vnni;
      return avx2 ? int8_avx2 : nullptr;
    case kBits:
      if (avx512 && __builtin_cpu_supports("avx512vpopcntdq")) return bits_vpopcnt;
      if (avx2) return bits_avx2;
      return width >= kAvx2 && __builtin_cpu_supports("popcnt") ? bits_popcnt : bits_base;
  }
  return nullptr;
}

}  // namespace

// Operations done in `rounds` rounds of a kind's loop on each of so many threads, no wider than
// asked; 0 where there is no such loop. The threads are OpenMP's, which are torch's own where torch
// has loaded the system's name of it: another pool would wait for torch's threads to stop spinning.
extern "C" __attribute__((visibility("default"))) int64_t filbert_peak(int kind, int width,
                                                                       int64_t rounds,
                                                                       int threads) {
  const Loop loop = loop_of(kind, width);
  if (!loop) return 0;
  int64_t done = 0;
#pragma omp parallel num_threads(threads) reduction(+ : done)
  done += loop(rounds);
  return done;
}
