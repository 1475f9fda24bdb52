#pragma once

#include "args/common.h"

namespace filbert {

constexpr int64_t bit_words(int64_t bits) { return (bits + 31) / 32; }

// The longest row: its ones can be counted in 16 bits, and the sum of its codes in 32.
constexpr int64_t kMaxRowWords = 2047;

// What an element equal to its threshold becomes. kExact has three codes: 0 below, 1 equal, 2
// above.
enum class Ties : int32_t { kBelow, kAbove, kExact };

constexpr int64_t planes_of(Ties ties) { return ties == Ties::kExact ? 2 : 1; }

// Rows of numbers to bit planes. Bit k % 32 of word k / 32 is element k; bits past K are 0.
// With `bits` 0, code = how x compares with the threshold. Otherwise
// code = clamp(round(x * (1 / scale)), low, low + 2^bits - 1) - low, in `bits` planes.
struct PackBitsArgs {
  const void* x;           // [T, K], rows of contiguous elements
  const float* threshold;  // [K] or null for 0
  const float* scale;      // [T] or null: from each row's largest magnitude
  uint32_t* words;         // [P, T, W], W = bit_words(K)
  int32_t* sums;           // [T], sum of a row's codes
  float* scale_out;        // [T], the scale as used; null when bits is 0
  DType dtype;             // of x
  Ties ties;
  int32_t bits;
  int32_t low;
  int64_t rows;   // T
  int64_t width;  // K
  int64_t x_row;  // stride of x in elements
};

constexpr int64_t planes_of(const PackBitsArgs& args) {
  return args.bits ? args.bits : planes_of(args.ties);
}

void pack_bits_cpu(const PackBitsArgs& args);
void pack_bits_cuda(const PackBitsArgs& args, void* stream);

}  // namespace filbert
