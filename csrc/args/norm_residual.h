#pragma once

#include "args/common.h"
#include "args/quantize_rows.h"

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
  QuantizedRows codes;   // [T, N] of the float32 results; null codes: not wanted
  int64_t x_row;         // stride of x
  int64_t residual_row;  // stride of residual
  int64_t out_row;       // stride of out
  int64_t rows;          // T
  int64_t width;         // N
  float eps;
};

// LayerNorm of what another operator has written, in place. Args has its fields of these names.
template <typename Args>
NormResidualArgs norm_of_output(const Args& args) {
  NormResidualArgs norm{};
  norm.dtype = args.dtype;
  norm.x = norm.out = args.out;
  norm.x_row = norm.out_row = norm.width = args.outputs;
  norm.residual = args.residual;
  norm.residual_row = args.residual_row;
  norm.weight = args.norm_weight;
  norm.beta = args.norm_bias;
  norm.rows = args.rows;
  norm.eps = args.eps;
  return norm;
}

void norm_residual_cpu(const NormResidualArgs& args);
void norm_residual_cuda(const NormResidualArgs& args, void* stream);

}  // namespace filbert
