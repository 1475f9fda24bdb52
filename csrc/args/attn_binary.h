#pragma once

#include "args/common.h"
#include "args/pack_bits.h"

namespace filbert {

constexpr int64_t kMaxBinaryDim = 128;  // elements of a head, a multiple of 32

// Attention whose queries, keys, values and weights are bits, over packed sequences.
//   S = q . k over +-1, chosen = S > 0 (or >= 0), context = sum of the chosen v, bits = its
//   comparison with a threshold.
// With a table, chosen = table[m] > half * sum of the row's table[m], m = (best S - S) / 2.
struct AttnBinaryArgs {
  const uint32_t* q;         // [T, H * D / 32]
  const uint32_t* k;         // [T, H * D / 32]
  const uint32_t* v;         // [T, H * D / 32]
  const int32_t* cu;         // [B + 1]
  const int32_t* threshold;  // [H * D] or null for 0
  const int64_t* table;      // [D + 1] or null for Boolean attention
  uint32_t* words;           // [P, T, H * D / 32], dense; P = planes_of(ties)
  int32_t* sums;             // [T]
  double half;
  Ties ties;                    // of the context with its threshold
  bool choose_zeros;            // whether a key with S = 0 is chosen; of no meaning with a table
  int64_t rows;                 // T
  int64_t sequences;            // B
  int64_t heads;                // H
  int64_t dim;                  // D
  int64_t max_seqlen;           // a hint: how a GPU cuts the work; results do not depend on it
  int64_t q_row, k_row, v_row;  // strides in words
};

void attn_binary_cpu(const AttnBinaryArgs& args);
void attn_binary_cuda(const AttnBinaryArgs& args, void* stream);

}  // namespace filbert
