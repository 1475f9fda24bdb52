#pragma once

#include "args/norm_residual.h"

namespace filbert {

// A table of rows of 8- or 4-bit codes: scale[v] * (code - 2^(bits - 1)).
struct CodeTable {
  const int64_t* ids;    // [T], or null: no such table
  const uint8_t* codes;  // [V, N], or with 4 bits [V, N / 2]: inputs 2 i and 2 i + 1 in byte i
  const float* scale;    // [V]
  int64_t entries;       // V
  int32_t bits;          // 8 or 4
};

// out = LayerNorm(the sum of a row of each table). Without norm_weight there is no LayerNorm. The
// row of an id that is in no table is NaN.
struct EmbeddingGroupedArgs {
  static constexpr int kTables = 3;
  DType dtype;                // of norm and out
  CodeTable tables[kTables];  // added in their order
  const void* norm_weight;    // [N] or null
  const void* norm_bias;      // [N] or null with it
  void* out;                  // [T, N]
  int64_t rows;               // T
  int64_t outputs;            // N
  float eps;
  // what norm_of_output reads: none here
  const void* residual;
  int64_t residual_row;
};

void embedding_grouped_cpu(const EmbeddingGroupedArgs& args);
void embedding_grouped_cuda(const EmbeddingGroupedArgs& args, void* stream);

}  // namespace filbert
