#pragma once

#include "args/common.h"

namespace filbert {

// out = LayerNorm(x + bias + residual). Row strides count elements; rows are contiguous.
struct NormResidualArgs {
  DType dtype;           // of every tensor
  const void* x;         // [T, N]
  const void* bias;      // [N] or null
  const void* residual;  // [T, N] or null
  const void* weight;    // [N]
  const void* beta;      // [N]
  void* out;             // [T, N], may be x
  int64_t x_row;         // stride of x
  int64_t residual_row;  // stride of residual
  int64_t out_row;       // stride of out
  int64_t rows;          // T
  int64_t width;         // N
  float eps;
};

}  // namespace filbert
