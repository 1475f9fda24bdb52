// Counting by table, where bytes can be looked up in a register (pshufb): four bits of a row choose
// the table of its 16 possible counts, four bits of 32 or 64 outputs choose from it. That is two
// instructions for 4 bits of each output, where a population count made of lookups takes four.
#pragma once

#include "cpu/linear_binary/block.h"
#include "cpu/linear_binary/sparse_plane.h"

#if !defined(__AVX512VPOPCNTDQ__) && ((FILBERT_VECTOR_BYTES == 32 && defined(__AVX2__)) || \
                                      (FILBERT_VECTOR_BYTES == 64 && defined(__AVX512BW__)))
#define FILBERT_COUNT_BY_TABLE 1
#else
#define FILBERT_COUNT_BY_TABLE 0
#endif

#if FILBERT_COUNT_BY_TABLE

namespace filbert {
namespace FILBERT_ISA {
namespace {

typedef uint8_t VecB __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));
typedef uint8_t VecBQuarter
    __attribute__((vector_size(FILBERT_VECTOR_BYTES / 4), aligned(1), may_alias));
typedef uint16_t VecW __attribute__((vector_size(FILBERT_VECTOR_BYTES), may_alias));

constexpr int kNibbles = 8;                                      // of a word
constexpr int kByteVectors = kColumns / FILBERT_VECTOR_BYTES;    // of one byte for each output
constexpr int kTableRows = FILBERT_VECTOR_BYTES == 64 ? 12 : 6;  // of a register tile
// Each lookup adds at most 4 to a byte, so this many nibbles' worth cannot overflow it.
constexpr int64_t kWordsBeforeOverflow = 255 / 4 / kNibbles;

// counts[a][w] = popcount(a & w)
struct CountTables {
  alignas(64) uint8_t counts[16][16];
};
constexpr CountTables make_tables() {
  CountTables tables{};
  for (int a = 0; a < 16; ++a) {
    for (int w = 0; w < 16; ++w) {
      const int both = a & w;
      tables.counts[a][w] = (both & 1) + (both >> 1 & 1) + (both >> 2 & 1) + (both >> 3);
    }
  }
  return tables;
}
constexpr CountTables kTables = make_tables();

FILBERT_INLINE VecB look_up(VecB table, VecB index) {
#if FILBERT_VECTOR_BYTES == 64
  return (VecB)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#else
  return (VecB)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#endif
}

// Half a vector of bytes, or of 16-bit numbers, from memory to twice the width. Spelled out,
// because GCC takes a conversion of vectors apart.
FILBERT_INLINE VecW widen(const uint8_t* p) {
#if FILBERT_VECTOR_BYTES == 64
  return (VecW)_mm512_maskz_cvtepu8_epi16(~0u,
                                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return (VecW)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}
FILBERT_INLINE VecI widen(const uint16_t* p) {
#if FILBERT_VECTOR_BYTES == 64
  return (VecI)_mm512_maskz_cvtepu16_epi32(0xffff,
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return (VecI)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

// The table of a nibble that comes multiplied by 16, in every 16 bytes of a vector.
FILBERT_INLINE VecB table_of(uint8_t offset) {
  const __m128i table =
      _mm_load_si128(reinterpret_cast<const __m128i*>(&kTables.counts[0][0] + offset));
#if FILBERT_VECTOR_BYTES == 64
  return (VecB)_mm512_maskz_broadcast_i32x4(0xffff, table);
#else
  return (VecB)_mm256_broadcastsi128_si256(table);
#endif
}

// Rows to offsets into the tables: each nibble times 16, in its order.
void expand_row(const uint32_t* words, int64_t n, uint8_t* offsets) {
  for (int64_t w = 0; w < n; ++w) {
    // Bytes of the word spread to 16 bits each: low nibble below, high nibble above.
    uint64_t spread = words[w];
    spread = (spread | spread << 16) & 0x0000ffff0000ffffu;
    spread = (spread | spread << 8) & 0x00ff00ff00ff00ffu;
    spread = (spread << 4 & 0x00f000f000f000f0u) | (spread << 8 & 0xf000f000f000f000u);
    __builtin_memcpy(offsets + w * kNibbles, &spread, sizeof spread);
  }
}

// The nibbles of a block's weights, a byte each: [W * 8][kColumns].
void expand_weight(const Block& block, uint8_t* nibbles) {
  const uint32_t* tile[kColumns / kTileOutputs];
  for (int i = 0; i < kColumns / kTileOutputs; ++i) tile[i] = block.tile(i);
  for (int64_t w = 0; w < block.args.row_words; ++w) {
    uint8_t* to = nibbles + w * kNibbles * kColumns;
#if FILBERT_VECTOR_BYTES == 32
    // The same byte of four outputs side by side, then of 32; each byte is two nibbles.
    const __m256i together =
        _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i low = _mm256_set1_epi8(15);
    for (int half = 0; half < 2; ++half) {
      __m256i group[4];
      for (int i = 0; i < 4; ++i) {
        const uint32_t* from = tile[2 * half + i / 2] + w * kTileWords + i % 2 * 8;
        group[i] = _mm256_shuffle_epi8((__m256i)load(from), together);
      }
      const __m256i a = _mm256_unpacklo_epi32(group[0], group[1]);
      const __m256i b = _mm256_unpacklo_epi32(group[2], group[3]);
      const __m256i c = _mm256_unpackhi_epi32(group[0], group[1]);
      const __m256i d = _mm256_unpackhi_epi32(group[2], group[3]);
      const __m256i bytes[4] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b),
                                _mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d)};
      for (int i = 0; i < 4; ++i) {
        const __m256i byte = _mm256_permutevar8x32_epi32(bytes[i], in_order);
        __m256i* at = reinterpret_cast<__m256i*>(to + 2 * i * kColumns + 32 * half);
        _mm256_store_si256(at, _mm256_and_si256(byte, low));
        _mm256_store_si256(at + kColumns / 32, _mm256_and_si256(_mm256_srli_epi16(byte, 4), low));
      }
    }
#else
    for (int i = 0; i < kColumns / kTileOutputs; ++i) {
      const VecU words = load(tile[i] + w * kTileWords);
      for (int n = 0; n < kNibbles; ++n) {
        *reinterpret_cast<VecBQuarter*>(to + n * kColumns + i * kTileOutputs) =
            __builtin_convertvector(words >> 4 * n & 15, VecBQuarter);
      }
    }
#endif
  }
}

// counts of `kN` rows whose offsets begin at `offsets`, `stride` bytes apart. Not inlined: within a
// larger function GCC keeps the sums in memory.
template <int kN>
__attribute__((noinline)) void count_rows_by_table(const uint8_t* offsets, int64_t stride,
                                                   const uint8_t* nibbles, int64_t words,
                                                   int32_t* counts, bool first_plane) {
  alignas(64) uint16_t sums[kN][kColumns];  // written first, then added to
  for (int64_t begin = 0; begin < words; begin += kWordsBeforeOverflow) {
    const int64_t end = begin + kWordsBeforeOverflow < words ? begin + kWordsBeforeOverflow : words;
    VecB acc[kN][kByteVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kN; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kByteVectors; ++v) acc[r][v] = VecB{};
    }
    for (int64_t k = begin * kNibbles; k < end * kNibbles; ++k) {
      VecB weight[kByteVectors];
      for (int v = 0; v < kByteVectors; ++v) {
        weight[v] =
            *reinterpret_cast<const VecB*>(nibbles + k * kColumns + v * FILBERT_VECTOR_BYTES);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kN; ++r) {
        const VecB table = table_of(offsets[r * stride + k]);
#pragma GCC unroll 2
        for (int v = 0; v < kByteVectors; ++v) {
          acc[r][v] += look_up(table, weight[v]);
          // Keeps the sum where it is; the compiler would move it to a fresh register each time.
          asm("" : "+x"(acc[r][v]));
        }
      }
    }
    // By way of memory, so that the loop above can keep the sums in registers.
    alignas(64) uint8_t bytes[kN][kColumns];
#pragma GCC unroll 12
    for (int r = 0; r < kN; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kByteVectors; ++v) {
        *reinterpret_cast<VecB*>(&bytes[r][v * FILBERT_VECTOR_BYTES]) = acc[r][v];
      }
    }
    for (int r = 0; r < kN; ++r) {
      for (int c = 0; c < kColumns; c += FILBERT_VECTOR_BYTES / 2) {
        VecW& sum = *reinterpret_cast<VecW*>(&sums[r][c]);
        sum = begin == 0 ? widen(&bytes[r][c]) : sum + widen(&bytes[r][c]);
      }
    }
  }
  for (int r = 0; r < kN; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      int32_t* at = counts + r * kColumns + v * kLanes;
      const VecI plane = widen(&sums[r][v * kLanes]);
      store(at, first_plane ? plane : 2 * load(at) + plane);
    }
  }
}

int64_t offset_bytes(const LinearBinaryArgs& args) {
  return kBinaryRows * args.planes * args.row_words * kNibbles;
}

// What counting needs of the rows, made once for all columns of a task.
void prepare_rows(const Block& block, const SparsePlane& sparse, uint8_t* scratch) {
  const int64_t row_bytes = block.args.row_words * kNibbles;
  for (int p = 0; p < block.args.planes; ++p) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t tile = r / kTableRows * kTableRows;
      if (sparse.few(tile, block.rows - tile < kTableRows ? block.rows - tile : kTableRows, p)) {
        continue;
      }
      expand_row(block.row(r, p), block.args.row_words,
                 scratch + (p * kBinaryRows + r) * row_bytes);
    }
  }
}

int64_t table_scratch(const LinearBinaryArgs& args) {
  return (offset_bytes(args) + 63) / 64 * 64 + args.row_words * kNibbles * kColumns;
}

void count_by_table(const Block& block, const SparsePlane& sparse, uint8_t* scratch,
                    int32_t* counts) {
  const int64_t words = block.args.row_words, row_bytes = words * kNibbles;
  uint8_t* nibbles = scratch + (offset_bytes(block.args) + 63) / 64 * 64;
  expand_weight(block, nibbles);
  for (int64_t r = 0; r < block.rows;) {
    const int64_t left = block.rows - r;
    const int n = left < kTableRows ? static_cast<int>(left) : kTableRows;
    for (int p = block.args.planes - 1; p >= 0; --p) {  // the highest first, doubled on the way
      if (sparse.few(r, n, p)) {
        sparse.add(block, r, n, counts);
        continue;
      }
      const uint8_t* from = scratch + (p * kBinaryRows + r) * row_bytes;
      int32_t* to = counts + r * kColumns;
      const bool first = p == block.args.planes - 1;
#define FILBERT_COUNT(rows_)                                                \
  case rows_:                                                               \
    count_rows_by_table<rows_>(from, row_bytes, nibbles, words, to, first); \
    break;
      switch (n) {
        FILBERT_COUNT(1)
        FILBERT_COUNT(2)
        FILBERT_COUNT(3)
        FILBERT_COUNT(4)
        FILBERT_COUNT(5)
        FILBERT_COUNT(6)
#if FILBERT_VECTOR_BYTES == 64
        FILBERT_COUNT(7)
        FILBERT_COUNT(8)
        FILBERT_COUNT(9)
        FILBERT_COUNT(10)
        FILBERT_COUNT(11)
        FILBERT_COUNT(12)
#endif
      }
#undef FILBERT_COUNT
    }
    r += n;
  }
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert

#endif
