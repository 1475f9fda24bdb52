#pragma once

#include "args/attn_varlen.h"
#include "args/linear_dense.h"

namespace filbert {

// What makes one of query, key and value of all heads from latents. Head h reads `rank` columns of
// them, from begin + h / (H / groups) * rank on: with one group all heads read the same.
struct HeadFactors {
  const void* weight;  // [H, D, held], each head's [D, held] packed as linear_dense's
  const void* bias;    // [H, D] or null
  int64_t begin, rank, groups;
  int64_t held;  // R, or more: the first R inner steps are used
};

// Packed variable-length attention of a sequence over itself, from latents in the place of query,
// key and value.
struct AttnLowRankArgs {
  DType dtype;         // of latent, biases and out: float32 or bfloat16
  DType weight_dtype;  // of the factors: float32, float16 or bfloat16
  const void* latent;  // [T, L]
  HeadFactors query, key, value;
  const int32_t* cu;      // [B + 1]
  const float* key_bias;  // [T] or null
  void* out;              // [T, H, D]
  int64_t latent_row;     // stride of latent, in elements
  int64_t rows;           // T
  int64_t sequences;      // B
  int64_t heads;          // H
  int64_t dim;            // D
  float scale;
};

void attn_lowrank_cpu(const AttnLowRankArgs& args);

}  // namespace filbert
