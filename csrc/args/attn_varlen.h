#pragma once

#include "args/common.h"

namespace filbert {

// The largest head dimension D of the kernels: on a CPU any D up to the first, on a GPU multiples
// of kAttnDimStepCuda up to the second. The binding pads others with zeros there.
constexpr int64_t kAttnMaxDim = 256;
constexpr int64_t kAttnMaxDimCuda = 128;
constexpr int64_t kAttnDimStepCuda = 8;

// Packed variable-length attention. T* are rows of all sequences together, B sequences, H heads of
// D elements. Strides count elements; the last dimension of q, k, v and out is contiguous.
struct AttnVarlenArgs {
  DType dtype;                // of q, k, v, out
  const void* q;              // [Tq, H, D]
  const void* k;              // [Tk, H, D]
  const void* v;              // [Tk, H, D]
  void* out;                  // [Tq, H, D]
  float* lse;                 // [H, Tq]
  const int32_t* cu_q;        // [B + 1]
  const int32_t* cu_k;        // [B + 1]
  const float* alibi_slopes;  // [H] or null
  const float* key_bias;      // [Tk] or null
  const int32_t* tiles;   // the work list that attn_tiles made; CUDA only, see args/attn_tiles.h
  int64_t q_row, q_head;  // strides of q
  int64_t k_row, k_head;
  int64_t v_row, v_head;
  int64_t out_row, out_head;
  int64_t rows_q;        // Tq
  int64_t rows_k;        // Tk
  int64_t sequences;     // B
  int64_t capacity;      // of tiles
  bool self_attention;   // cu_q and cu_k are one tensor: a sequence has as many keys as queries
  int64_t heads;         // H
  int64_t dim;           // D
  int64_t window_left;   // keys visible before the query's place, or -1 for all
  int64_t window_right;  // and after
  float scale;
};

void attn_varlen_cpu(const AttnVarlenArgs& args);
void attn_varlen_cuda(const AttnVarlenArgs& args, void* stream);

}  // namespace filbert
