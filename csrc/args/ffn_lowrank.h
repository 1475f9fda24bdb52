#pragma once

#include "args/activation.h"
#include "args/linear_dense.h"

namespace filbert {

// A weight of low rank as two factors, W = B A. On a CPU each is packed as linear_dense's; on a GPU
// rows follow each other, padded with zeros to multiples of 16 both ways.
struct LowRankFactors {
  const void* a;     // of [R, K]; of up it may be null, for the identity: R is K then
  const void* b;     // of [N, R]; of down it may be null, likewise: R is N then
  const void* bias;  // [N] or null
  int64_t rank;      // R
  int64_t held;      // the rank that they were packed with: R, or more, and the first R are used
};

// The largest rank of the kernel for GPUs, whose registers hold sums as wide as the rank.
constexpr int64_t kLowRankMostRankCuda = 256;

// out = LayerNorm(act(x W_up^T + bias) W_down^T + bias + residual). Without norm_weight there is no
// LayerNorm. Row strides count elements; rows are contiguous.
struct FfnLowRankArgs {
  DType dtype;              // of x and all but the factors: float32 or bfloat16
  DType weight_dtype;       // of the factors: float32, float16 or bfloat16
  const void* x;            // [T, K]
  LowRankFactors up, down;  // [I, K] and [N, I]
  const void* residual;     // [T, N] or null
  const void* norm_weight;  // [N] or null
  const void* norm_bias;    // [N] or null with it
  void* out;                // [T, N]
  int64_t x_row;            // stride of x
  int64_t residual_row;     // stride of residual
  int64_t rows;             // T
  int64_t inputs;           // K
  int64_t inner;            // I
  int64_t outputs;          // N
  Activation activation;
  float eps;
  float* partial;  // CUDA only: sums of the splits, ffn_lowrank_partial_values of them
  int64_t splits;  // likewise, set by ffn_lowrank_cuda
};

void ffn_lowrank_cpu(const FfnLowRankArgs& args);
void ffn_lowrank_cuda(const FfnLowRankArgs& args, void* stream);
// How many values of working memory a call needs on a GPU; 0 for none.
int64_t ffn_lowrank_partial_values(const FfnLowRankArgs& args);

}  // namespace filbert
