#pragma once

#include "args/activation.h"
#include "args/common.h"

namespace filbert {

// How many outputs lie side by side in a packed weight.
constexpr int64_t kDensePanel = 16;

// out = LayerNorm(act(x W^T + bias) + residual). Without norm_weight there is no LayerNorm. Row
// strides count elements; rows are contiguous.
struct LinearDenseArgs {
  DType dtype;              // of x and all but the weight: float32 or bfloat16
  DType weight_dtype;       // float32, float16, or bfloat16
  const void* x;            // [T, K]
  const void* weight;       // [ceil(N/16), K, 16]; bfloat16 [ceil(N/16), ceil(K/2), 16, 2]
  const void* bias;         // [N] or null
  const void* residual;     // [T, N] or null
  const void* norm_weight;  // [N] or null
  const void* norm_bias;    // [N] or null with it
  void* out;                // [T, N]
  int64_t x_row;            // stride of x
  int64_t residual_row;     // stride of residual
  int64_t rows;             // T
  int64_t inputs;           // K
  int64_t weight_inputs;    // of the packed weight: K, or more, and the first K are used
  int64_t outputs;          // N
  Activation activation;
  float eps;
};

void linear_dense_cpu(const LinearDenseArgs& args);

}  // namespace filbert
