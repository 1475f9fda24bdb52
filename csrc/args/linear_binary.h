#pragma once

#include "args/common.h"

#ifdef __CUDACC__
#define FILBERT_ARGS_FUNCTION __host__ __device__
#else
#define FILBERT_ARGS_FUNCTION
#endif

namespace filbert {

constexpr int64_t kTileOutputs = 16;  // outputs that lie side by side in the weight

// Inputs x = step * code + low with codes in bit planes, weights w = 2 * bit - 1:
//   dot[t, n] = step * (2 * P[t, n] - sums[t]) + low * totals[n],
//   P = sum over planes p of 2^p * popcount(plane_p[t] & weight[n]).
// What pads K is zero in words and weight, and so drops out.
//
// Either out = scale[t] * alpha[n] * dot + bias[n] (+ residual, or LayerNorm with residual), or,
// where `threshold` is given, bits: dot >= threshold[n], or dot < until[n].
// With `lower` or `lower_until` there are two bits: the first and dot >= lower[n] (threshold[n]
// where `lower` is null), or dot < lower_until[n]; the code is how many of them are ones, in two
// planes.
struct LinearBinaryArgs {
  const uint32_t* words;   // [P, T, W]
  const int32_t* sums;     // [T]
  const uint32_t* weight;  // [ceil(N / 16), W, 16]
  const int32_t* totals;   // [N], the sum of an output's weights
  int64_t rows;            // T
  int64_t outputs;         // N
  int64_t row_words;       // W
  int64_t plane_stride;    // words from one plane to the next
  int64_t row_stride;      // words from one row to the next
  int32_t planes;          // P
  int32_t step;
  int32_t low;

  // numbers out
  DType dtype;              // of residual, norm_weight, norm_bias and out
  const float* alpha;       // [N]
  const float* bias;        // [N] or null
  const float* scale;       // [T] or null
  const void* residual;     // [T, N] or null
  const void* norm_weight;  // [N] or null: no LayerNorm
  const void* norm_bias;    // [N] or null
  void* out;                // [T, N], dense
  int64_t residual_row;     // stride in elements
  float eps;

  // bits out
  const int32_t* threshold;    // [N] or null
  const int32_t* until;        // [N] or null
  const int32_t* lower;        // [N] or null
  const int32_t* lower_until;  // [N] or null
  uint32_t* out_words;         // [planes_out, T, ceil(N / 32)]
  int32_t* out_sums;           // [T], sum of a row's codes
};

// Planes of the bits out, by whether there is a `lower` and a `lower_until`. Kernels ask, too.
FILBERT_ARGS_FUNCTION constexpr int32_t planes_out(bool lower, bool lower_until) {
  return lower || lower_until ? 2 : 1;
}

FILBERT_ARGS_FUNCTION constexpr int32_t planes_out(const LinearBinaryArgs& args) {
  return planes_out(args.lower != nullptr, args.lower_until != nullptr);
}

void linear_binary_cpu(const LinearBinaryArgs& args);
void linear_binary_cuda(const LinearBinaryArgs& args, void* stream);

}  // namespace filbert
