// Three ways to multiply rows of codes with a part of some panels, all exact.
//
//   way      instructions for 4 inputs of a vector of outputs      where
//   Quads    1: vpdpbusd; vpmulld, vpaddd once a group, unless     VNNI
//            the multipliers go into the numbers
//   Chains   2 + 2 / chain: vpmaddubsw, vpaddw; then vpmaddwd,     AVX2 and AVX-512 without VNNI,
//            vpaddd once a chain                                   2 to 6 bits
//   Halves   4: twice vpmaddwd, vpaddd                             the others, and 8 bits there
//
// The law of a chain: vpmaddubsw adds two products of a code of 8 bits and a number of b bits, at
// most 2 * 255 * 2^(b-1) = 255 * 2^b. A chain of 2^(7-b) of these is at most 255 * 128 = 32640: no
// int16 overflows, whatever the operands. 8 bits have no chain.
//
// Each way says how large its tile is, how it wants codes and numbers, and multiplies a tile of
// some rows with the part of some panels:
//
//   sums[r][column] += multiplier[group][column] * sum over the group's inputs
//
// Sums lie in L1, [row][column]. They go through registers once for each group or, without groups,
// for each part; those of chains of a unit or more once for each chain. kStep is how many quads of
// a chain share a turn of its loop.
#pragma once

#include "cpu/linear_grouped/panel.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int kColumns = 16;                       // of a panel
constexpr int kColumnVectors = kColumns / kLanes;  // of a panel

// A part of the panels of a tile, unpacked, and what its groups are multiplied with.
struct Part {
  const uint8_t* numbers;
  int64_t panel_bytes;
  const int32_t* multipliers;  // [panel][group][16] as the way wants them, or null
  int64_t multiplier_panel;    // elements of a panel
  int64_t units;
  int64_t group_units;  // of a group, or `units`
  int64_t chain_quads;  // of a chain, at most
  // What is unpacked next comes to L2 meanwhile: a line of each panel, `ahead_panel` bytes apart,
  // in every turn of a tile's loop, and `ahead_turn` bytes further the next time. Asked for all at
  // once they would take every place that a core has for lines under way.
  const uint8_t* ahead;
  int64_t ahead_panel, ahead_turn;
};

template <int kPanels>
FILBERT_INLINE void fetch_ahead(const uint8_t*& ahead, const Part& part) {
#pragma GCC unroll 2
  for (int p = 0; p < kPanels; ++p) __builtin_prefetch(ahead + p * part.ahead_panel, 0, 2);
  ahead += part.ahead_turn;
}

template <int kPanels>
FILBERT_INLINE const uint8_t* column_at(const Part& part, int j) {
  static_assert(kPanels <= 2, "");
  return part.numbers + j / kColumnVectors * part.panel_bytes +
         j % kColumnVectors * FILBERT_VECTOR_BYTES;
}

template <int kRows, int kVectors, bool kScaled>
FILBERT_INLINE void add_group(VecI (&sum)[kRows][kVectors], const Part& part, int64_t group,
                              int32_t* sums) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      int32_t* at = sums + (r * kVectors + j) * kLanes;
      if constexpr (kScaled) {
        const int32_t* m = part.multipliers + j / kColumnVectors * part.multiplier_panel +
                           group * kColumns + j % kColumnVectors * kLanes;
        store(at, load(at) + sum[r][j] * load(m));
      } else {
        store(at, load(at) + sum[r][j]);
      }
    }
  }
}

struct Quads {
  // 12 x 2 sums, 2 vectors of the panels and a row's quad of 32 registers; 6 x 2 of 16.
  static constexpr int kPanels = FILBERT_VECTOR_BYTES == 64 ? 2 : 1;
  static constexpr int kRows = FILBERT_VECTOR_BYTES == 64 ? 12 : 6;
  static constexpr int64_t kUnits = 16;     // of a part: 8 KB of each panel, as bytes
  static constexpr int64_t kCodeBytes = 1;  // of an element of a row
  static constexpr int64_t kNumberBytes = 1;
  static constexpr bool kFolds = true;  // small multipliers go into the numbers
  static constexpr int32_t kOne = 1;  // what multipliers are multiplied with when they are unpacked

  // Few rows have few sums: each is made of several, which hide the latency.
  template <int kTileRows>
  static constexpr int kSums = kTileRows == 1   ? 4
                               : kTileRows <= 3 ? 2
                                                : 1;
  // Quads of a turn of a tile's loop.
  template <int kTileRows>
  static constexpr int kTurnQuads = kSums<kTileRows> < 2 ? 2 : kSums<kTileRows>;
  static constexpr int64_t turns(int64_t units, int64_t rows) {
    return units * kQuads / (rows == 1 ? 4 : 2);
  }

  template <int kBits>
  static void unpack(const uint8_t* from, int64_t units, uint8_t* to) {
    unpack_bytes<kBits>(from, units, to);
  }

  template <int kStep, int kTileRows, int kTilePanels, bool kScaled>
  static FILBERT_INLINE void tile(const uint8_t* a, int64_t a_row, const Part& part,
                                  int32_t* sums) {
    constexpr int kVectors = kTilePanels * kColumnVectors;
    constexpr int kWays = kSums<kTileRows>;
    constexpr int kTurn = kTurnQuads<kTileRows>;
    const uint8_t* ahead = part.ahead;
    for (int64_t unit = 0, group = 0; unit < part.units; unit += part.group_units, ++group) {
      VecI sum[kWays][kTileRows][kVectors] = {};
      const int64_t begin = unit * kQuads, end = begin + part.group_units * kQuads;
      // A pointer for three rows, which an address reaches with 0, 1 or 2 times the stride: one for
      // each row would not fit the registers.
      const uint8_t* rows[(kTileRows + 2) / 3];
#pragma GCC unroll 4
      for (int i = 0; i < (kTileRows + 2) / 3; ++i) rows[i] = a + 3 * i * a_row + 4 * begin;
      for (int64_t q = begin; q < end; q += kTurn) {
#pragma GCC unroll 4
        for (int i = 0; i < (kTileRows + 2) / 3; ++i) asm("" : "+r"(rows[i]));
#pragma GCC unroll 4
        for (int turn = 0; turn < kTurn; ++turn) {
          VecU numbers[kVectors];
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) {
            numbers[j] = load_bytes(column_at<kTilePanels>(part, j) + (q + turn) * kQuadBytes);
          }
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) {
            const VecU quad = broadcast(word_at(rows[r / 3] + r % 3 * a_row + 4 * turn));
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
              VecI& to = sum[turn % kWays][r][j];
              to = dot_quads(to, quad, numbers[j]);
            }
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < (kTileRows + 2) / 3; ++i) rows[i] += 4 * kTurn;
        fetch_ahead<kTilePanels>(ahead, part);
      }
#pragma GCC unroll 4
      for (int way = 1; way < kWays; ++way) {
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sum[0][r][j] += sum[way][r][j];
        }
      }
      add_group<kTileRows, kVectors, kScaled>(sum[0], part, group, sums);
    }
  }

  static FILBERT_INLINE uint32_t word_at(const uint8_t* p) {
    uint32_t word;
    __builtin_memcpy(&word, p, 4);
    return word;
  }
};

#if FILBERT_BYTE_CHAINS
struct Chains {
  // 4 x 2 chains, two vectors of numbers, a row's quad and a product: with 6 x 2 of 16 registers
  // GCC keeps some in memory, and 4 x 2 is as fast.
  static constexpr int kPanels = FILBERT_VECTOR_BYTES == 64 ? 2 : 1;
  static constexpr int kRows = FILBERT_VECTOR_BYTES == 64 ? 6 : 4;
  // All 768 inputs of a BERT are one part, 12 KB: fewer calls, and fewer ways of a sum to memory.
  static constexpr int64_t kUnits = 24;
  static constexpr int64_t kCodeBytes = 1;
  static constexpr int64_t kNumberBytes = 1;
  static constexpr bool kFolds = false;
  static constexpr int32_t kOne = 0x10001;  // a pair of halves

  // A tile has no registers to fetch ahead with: all of its share is asked for before it.
  static constexpr int64_t turns(int64_t, int64_t) { return 0; }

  template <int kBits>
  static void unpack(const uint8_t* from, int64_t units, uint8_t* to) {
    unpack_bytes<kBits>(from, units, to);
  }

  template <int kStep, int kTileRows, int kTilePanels, bool kScaled>
  static FILBERT_INLINE void tile(const uint8_t* a, int64_t a_row, const Part& part,
                                  int32_t* sums) {
    if constexpr (kStep == kQuads) {
      shared<kTileRows, kTilePanels, kScaled>(a, a_row, part, sums);
    } else {
      by_rows<kStep, kTileRows, kTilePanels, kScaled>(a, a_row, part, sums);
    }
  }

  // All rows take a vector of numbers while it is in a register. Chains are in registers too; their
  // sums go through memory after each.
  template <int kTileRows, int kTilePanels, bool kScaled>
  static FILBERT_INLINE void shared(const uint8_t* a, int64_t a_row, const Part& part,
                                    int32_t* sums) {
    constexpr int kVectors = kTilePanels * kColumnVectors;
    const int64_t most = part.chain_quads / kQuads;
    const int64_t chain_units = part.group_units < most ? part.group_units : most;
    const int32_t* multipliers = part.multipliers;
    int64_t left_in_group = part.group_units;
    const uint8_t* numbers = part.numbers;
    for (int64_t left = part.units; left > 0; left -= chain_units) {
      const int64_t taken = left < chain_units ? left : chain_units;
      VecS links[kTileRows][kVectors] = {};
      for (int64_t unit = 0; unit < taken; ++unit) {
#pragma GCC unroll 8
        for (int q = 0; q < kQuads; ++q) {
          VecU own[kVectors];
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) {
            own[j] = load_bytes(numbers + j / kColumnVectors * part.panel_bytes +
                                j % kColumnVectors * FILBERT_VECTOR_BYTES + q * kQuadBytes);
            asm("" : FILBERT_VECTOR_REGISTER(own[j]));
          }
#pragma GCC unroll 16
          for (int r = 0; r < kTileRows; ++r) {
            const VecU four = broadcast(Quads::word_at(a + r * a_row + 4 * q));
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
              links[r][j] += multiply_bytes(four, own[j]);
              asm("" : FILBERT_VECTOR_REGISTER(links[r][j]));
            }
          }
        }
        a += kGroupedUnit;
        numbers += kQuads * kQuadBytes;
      }
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        const VecI m = kScaled ? load(multipliers + j / kColumnVectors * part.multiplier_panel +
                                      j % kColumnVectors * kLanes)
                               : broadcast(kOne);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          int32_t* at = sums + (r * kVectors + j) * kLanes;
          store(at, load(at) + multiply_pairs((VecI)links[r][j], m));
        }
      }
      if constexpr (kScaled) {
        left_in_group -= chain_units;
        if (left_in_group <= 0) {
          left_in_group = part.group_units;
          multipliers += kColumns;
        }
      }
    }
  }

  // Several chains for each unit, too short to go through memory after each: sums in registers, and
  // one row after the other.
  template <int kStep, int kTileRows, int kTilePanels, bool kScaled>
  static FILBERT_INLINE void by_rows(const uint8_t* a, int64_t a_row, const Part& part,
                                     int32_t* sums) {
    constexpr int kVectors = kTilePanels * kColumnVectors;
    VecI sum[kTileRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[r][j] = load(sums + (r * kVectors + j) * kLanes);
    }
    const int32_t* multipliers = part.multipliers;
    int64_t left_in_group = part.group_units;
    for (int64_t unit = 0; unit < part.units; ++unit) {
      VecI m[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        m[j] = kScaled ? load(multipliers + j / kColumnVectors * part.multiplier_panel +
                              j % kColumnVectors * kLanes)
                       : broadcast(kOne);
      }
      if (kScaled && --left_in_group == 0) {
        left_in_group = part.group_units;
        multipliers += kColumns;
      }
#pragma GCC unroll 4
      for (int first = 0; first < kQuads; first += kStep) {
        chain<kTileRows, kTilePanels, kStep>(a, a_row, part, unit * kQuads + first, m, sum);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(sums + (r * kVectors + j) * kLanes, sum[r][j]);
    }
  }

  // One chain for each sum: kStep quads from `quad` on.
  template <int kTileRows, int kTilePanels, int kStep, int kVectors>
  static FILBERT_INLINE void chain(const uint8_t* a, int64_t a_row, const Part& part, int64_t quad,
                                   const VecI (&m)[kVectors], VecI (&sum)[kTileRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      VecS links[kVectors] = {};
      const uint8_t* codes = a + r * a_row + 4 * quad;
      const uint8_t* numbers[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        numbers[j] = column_at<kTilePanels>(part, j) + quad * kQuadBytes;
      }
#pragma GCC unroll 8
      for (int q = 0; q < kStep; ++q) {
        const VecU four = broadcast(Quads::word_at(codes + 4 * q));
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
          links[j] += multiply_bytes(four, load_bytes(numbers[j] + q * kQuadBytes));
          // Else GCC makes all products before it adds any, and has no registers for them.
          asm("" : FILBERT_VECTOR_REGISTER(links[j]));
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        sum[r][j] += multiply_pairs((VecI)links[j], m[j]);
        asm("" : FILBERT_VECTOR_REGISTER(sum[r][j]));  // before the next chain begins
      }
    }
  }
};
#endif

struct Halves {
  static constexpr int kPanels = FILBERT_VECTOR_BYTES == 64 ? 2 : 1;
  static constexpr int kRows = FILBERT_VECTOR_BYTES == 64 ? 8 : FILBERT_VECTOR_BYTES == 32 ? 4 : 2;
  static constexpr int64_t kUnits = 16;
  static constexpr int64_t kCodeBytes = 2;
  static constexpr int64_t kNumberBytes = 2;
  static constexpr bool kFolds = false;
  static constexpr int32_t kOne = 1;

  static constexpr int64_t turns(int64_t units, int64_t) { return units * 2 * kQuads; }

  template <int kBits>
  static void unpack(const uint8_t* from, int64_t units, uint8_t* to) {
    unpack_halves<kBits>(from, units, to);
  }

  template <int kStep, int kTileRows, int kTilePanels, bool kScaled>
  static FILBERT_INLINE void tile(const uint8_t* a, int64_t a_row, const Part& part,
                                  int32_t* sums) {
    constexpr int kVectors = kTilePanels * kColumnVectors;
    const uint8_t* ahead = part.ahead;
    for (int64_t unit = 0, group = 0; unit < part.units; unit += part.group_units, ++group) {
      VecI sum[kTileRows][kVectors] = {};
      const int64_t begin = unit * 2 * kQuads, end = begin + part.group_units * 2 * kQuads;
      for (int64_t p = begin; p < end; ++p) {  // pairs of inputs
        VecI numbers[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
          numbers[j] = (VecI)load_bytes(column_at<kTilePanels>(part, j) + p * kQuadBytes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          const VecI pair = (VecI)broadcast(Quads::word_at(a + r * a_row + 4 * p));
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sum[r][j] += multiply_pairs(pair, numbers[j]);
        }
        fetch_ahead<kTilePanels>(ahead, part);
      }
      add_group<kTileRows, kVectors, kScaled>(sum, part, group, sums);
    }
  }
};

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
