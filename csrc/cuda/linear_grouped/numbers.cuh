// From fields of a few bits to the operand of mma.m16n8k32, in registers.
//
// A lane 4 g + t needs quads t and t + 4 of an output: one word holds both, see
// args/linear_grouped.h. Outputs 2 g and 2 g + 1 of a panel lie side by side, and are column g of
// two mma, so that lane t of a row's four gets outputs 4 t .. 4 t + 3 of the result.
//
// The code c of b bits goes to the top of its byte, and the topmost bit is turned over: as a signed
// byte that is (c - 2^(b-1)) * 2^(8-b). So sums are 2^(8-b) times as large as they should be, which
// fits int32 up to 65536 inputs (255 * 128 * 65536 < 2^31), and a shift makes them right, exactly.
#pragma once

#include "args/linear_grouped.h"
#include "cuda/device/ptx.cuh"

namespace filbert {
namespace cuda {

// Quads t and t + 4 of outputs 2 g and 2 g + 1.
struct NumberPairs {
  uint2 low, high;
};

constexpr uint32_t kSignBits = 0x80808080u;

// One word's fields: the low quad and the high one, at the top of their bytes, the sign turned
// over. place: t. For 3 and 6 bits `more` are the upper fields.
template <int kBits>
__device__ __forceinline__ void expand(uint32_t word, uint32_t more, int place, uint32_t& low,
                                       uint32_t& high) {
  const int pair = place / 2 * 2;  // where the field of 2 bits of quad t is in its byte
  if constexpr (kBits == 4) {
    low = (word << 4 & 0xf0f0f0f0u) ^ kSignBits;
    high = (word & 0xf0f0f0f0u) ^ kSignBits;
  } else if constexpr (kBits == 2) {
    const uint32_t fields = word >> pair;  // at 0 and 4
    low = (fields << 6 & 0xc0c0c0c0u) ^ kSignBits;
    high = (fields << 2 & 0xc0c0c0c0u) ^ kSignBits;
  } else if constexpr (kBits == 3) {
    const uint32_t fields = word >> pair, tops = more >> place;
    low = ((fields << 5 & 0x60606060u) | (tops << 7 & kSignBits)) ^ kSignBits;
    high = ((fields << 1 & 0x60606060u) | (tops << 3 & kSignBits)) ^ kSignBits;
  } else {
    static_assert(kBits == 6, "");
    const uint32_t fields = more >> pair;
    low = ((word << 2 & 0x3c3c3c3cu) | (fields << 6 & 0xc0c0c0c0u)) ^ kSignBits;
    high = ((word >> 2 & 0x3c3c3c3cu) | (fields << 2 & 0xc0c0c0c0u)) ^ kSignBits;
  }
}

// load(vector) gives the words of outputs 2 g and 2 g + 1 in that vector of 64 bytes of a unit.
template <int kBits, typename Load>
__device__ __forceinline__ NumberPairs numbers_of(int place, Load load) {
  NumberPairs pairs;
  if constexpr (kBits == 8) {
    pairs.low = load(place);
    pairs.high = load(place + 4);
    pairs.low.x ^= kSignBits, pairs.low.y ^= kSignBits;
    pairs.high.x ^= kSignBits, pairs.high.y ^= kSignBits;
  } else {
    const uint2 words = load(kBits == 4 || kBits == 6 ? place : place % 2);
    const uint2 more = kBits == 3 ? load(2) : kBits == 6 ? load(4 + place % 2) : uint2{0, 0};
    expand<kBits>(words.x, more.x, place, pairs.low.x, pairs.high.x);
    expand<kBits>(words.y, more.y, place, pairs.low.y, pairs.high.y);
  }
  return pairs;
}

// Up to 4 bits the multiplier of a group can go into the numbers, where it is no larger than 15, 31
// for 3 bits and 63 for 2: the products are bytes, -8 * 15 at the least. Larger ones have a second
// digit to the base of 16, 32 or 64.
template <int kBits>
constexpr bool kGroupedFolds = kBits <= 4;
template <int kBits>
constexpr int kFoldedDigit = 8 - kBits;  // bits of a digit
template <int kBits>
constexpr uint32_t kLargestFolded = (1u << kFoldedDigit<kBits>)-1;

// What folds a multiplier m into codes c of four bytes: c * m + shift is (c - 2^(b-1)) * m, the
// sign turned over. No byte carries into the next.
struct Folding {
  uint32_t multiplier, shift;

  template <int kBits>
  __device__ __forceinline__ static Folding of(uint32_t multiplier) {
    return {multiplier, kSignBits - multiplier * (0x01010101u << (kBits - 1))};
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t codes) const {
    return (codes * multiplier + shift) ^ kSignBits;
  }
};

// As expand, of codes at the bottom of their bytes.
template <int kBits>
__device__ __forceinline__ void expand_codes(uint32_t word, uint32_t more, int place, uint32_t& low,
                                             uint32_t& high) {
  const int pair = place / 2 * 2;
  if constexpr (kBits == 4) {
    low = word & 0x0f0f0f0fu;
    high = word >> 4 & 0x0f0f0f0fu;
  } else {
    const uint32_t fields = word >> pair;
    low = fields & 0x03030303u;
    high = fields >> 4 & 0x03030303u;
    if constexpr (kBits == 3) {
      const uint32_t tops = more >> place;
      low |= tops << 2 & 0x04040404u;
      high |= tops >> 2 & 0x04040404u;
    } else {
      static_assert(kBits == 2, "");
    }
  }
}

// As numbers_of, times a multiplier: `first` of outputs 2 g, `second` of outputs 2 g + 1.
template <int kBits, typename Load>
__device__ __forceinline__ NumberPairs products_of(int place, const Folding& first,
                                                   const Folding& second, Load load) {
  const uint2 words = load(kBits == 4 ? place : place % 2);
  const uint2 more = kBits == 3 ? load(2) : uint2{0, 0};
  NumberPairs codes;
  expand_codes<kBits>(words.x, more.x, place, codes.low.x, codes.high.x);
  expand_codes<kBits>(words.y, more.y, place, codes.low.y, codes.high.y);
  return {uint2{first(codes.low.x), second(codes.low.y)},
          uint2{first(codes.high.x), second(codes.high.y)}};
}

}  // namespace cuda
}  // namespace filbert
