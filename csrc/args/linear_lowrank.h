#pragma once

#include "args/ffn_lowrank.h"

namespace filbert {

// out = LayerNorm(act(x A^T B^T + bias) + residual). Without norm_weight there is no LayerNorm. Row
// strides count elements; rows are contiguous.
struct LinearLowRankArgs {
  DType dtype;              // of x and all but the factors: float32 or bfloat16
  DType weight_dtype;       // of the factors: float32, float16 or bfloat16
  const void* x;            // [T, K]
  LowRankFactors factors;   // of [N, K]
  const void* residual;     // [T, N] or null
  const void* norm_weight;  // [N] or null
  const void* norm_bias;    // [N] or null with it
  void* out;                // [T, N]
  int64_t x_row;            // stride of x
  int64_t residual_row;     // stride of residual
  int64_t rows;             // T
  int64_t inputs;           // K
  int64_t outputs;          // N
  Activation activation;
  float eps;
};

void linear_lowrank_cpu(const LinearLowRankArgs& args);
void linear_lowrank_cuda(const LinearLowRankArgs& args, void* stream);

}  // namespace filbert
