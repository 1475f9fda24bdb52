// A row of numbers to a row of 8-bit codes.
//
// A code c stands for scale * (c - zero). The range of a row holds 0, so that 0 has a code of its
// own. Every step is one IEEE operation in an order that all instruction sets and CUDA share, so
// codes are the same everywhere.
#pragma once

#include "cpu/simd/bytes.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

struct RowScale {
  float scale;
  int32_t zero;
};

// 1 / scale, or 0 where that is no finite number: every code is that of 0 then.
FILBERT_INLINE float inverse_of(float scale) {
  const float inverse = 1.0f / scale;
  return __builtin_isfinite(inverse) ? inverse : 0.0f;
}

// Rounds half to even; |v| is at most 2^22.
FILBERT_INLINE VecI round_to_int(VecF v) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  return (VecI)(v + kShift) - (VecI)broadcast(kShift);
}

// The least and the largest element of a row and 0, and whether all of it is finite.
struct Range {
  float low, high;
  bool finite;
};

template <typename T>
FILBERT_INLINE Range range_of(const T* x, int64_t width) {
  VecF low[2] = {}, high[2] = {};
  VecI bad = {};
  const auto add = [&](VecF v, int chain) {
    low[chain] = min(v, low[chain]);
    high[chain] = max(v, high[chain]);
    bad |= v != v;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    add(load(x + i), 0);
    add(load(x + i + kLanes), 1);
  }
  if (i + kLanes <= width) {
    add(load(x + i), 0);
    i += kLanes;
  }
  if (i < width) add(load_first(x + i, width - i), 1);
  const Range found = {-reduce_max(-min(low[0], low[1])), reduce_max(max(high[0], high[1])), false};
  const bool finite = __builtin_isfinite(found.low) && __builtin_isfinite(found.high);
  return {found.low, found.high, finite && !sign_bits(bad)};
}

// What the codes of a row with that range stand for. A row with NaN or infinities has the scale
// NaN: whatever is computed from its codes is NaN.
FILBERT_INLINE RowScale scale_of(Range range) {
  if (!range.finite) return {__builtin_nanf(""), 0};
  // Not (high - low) / 255, which may be infinite.
  const float scale = range.high / 255.0f - range.low / 255.0f;
  const VecF zero = broadcast(-range.low * inverse_of(scale));
  return {scale, round_to_int(min(zero, broadcast(255.0f)))[0]};
}

template <typename T>
FILBERT_INLINE void write_codes(const T* x, int64_t width, RowScale by, uint8_t* codes) {
  const VecF inverse = broadcast(inverse_of(by.scale));
  const VecF low = broadcast(static_cast<float>(-by.zero));
  const VecF high = low + 255.0f;
  // The bounds are integers, so clamping first changes nothing and keeps the sum in range. NaN
  // becomes the low bound; its row has the scale NaN anyway.
  const auto code = [&](VecF v) {
    return round_to_int(min(max(v * inverse, low), high)) + by.zero;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    const VecI all[4] = {code(load(x + i)), code(load(x + i + kLanes)),
                         code(load(x + i + 2 * kLanes)), code(load(x + i + 3 * kLanes))};
    store_as_bytes(codes + i, all);
  }
  for (; i < width; i += kLanes) {
    const int64_t left = width - i < kLanes ? width - i : kLanes;
    const VecI some = code(left == kLanes ? load(x + i) : load_first(x + i, left));
    for (int64_t l = 0; l < left; ++l) codes[i + l] = static_cast<uint8_t>(some[l]);
  }
}

// A row by its own range.
template <typename T>
FILBERT_INLINE RowScale quantize_row(const T* x, int64_t width, uint8_t* codes) {
  const RowScale by = scale_of(range_of(x, width));
  write_codes(x, width, by, codes);
  return by;
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
