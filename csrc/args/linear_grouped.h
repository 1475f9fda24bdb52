#pragma once

#include "args/activation.h"
#include "args/norm_residual.h"
#include "args/quantize_rows.h"

namespace filbert {

// A weight of a few bits lies in panels of 16 outputs and units of 32 inputs, on every device. A
// code c from 0 to 2^bits - 1 is the number c - 2^(bits - 1); inputs and outputs that are not there
// are the number 0.
//
// A unit of a panel is 8 quads of 4 inputs. Its codes are cut into fields of 4, 2 or 1 bits, low
// ones first, and a kind of field lies in vectors of 64 bytes, byte 4 n + k for output n and input
// k of a quad:
//
//   bits   vectors of 64 bytes                     quad q is
//   8      8 of bytes                              vector q
//   6      4 of 4-bit fields, 2 of 2-bit fields    as below, low 4 bits and high 2
//   4      4 of 4-bit fields                       vector q % 4, the low half of a byte for q < 4
//   3      2 of 2-bit fields, 1 of 1-bit fields    low 2 bits and the high one
//   2      2 of 2-bit fields                       vector q % 2, bits 2 (q / 2) of a byte and next
//   (1)    1 of 1-bit fields                       bit q of a byte
//
// So that a unit of b bits takes 64 b bytes, one mask and one shift make a vector of codes, and a
// thread of mma.m16n8k32, which multiplies quads t and t + 4 of one output, finds both in one word.
constexpr int64_t kGroupedPanel = 16;
constexpr int64_t kGroupedUnit = 32;
constexpr int64_t kGroupedUnitBytes = 64;  // for each bit

// out = LayerNorm(act(scale * sum + bias) + residual), where for row t and output n
//
//   sum = sum over groups g of multiplier[g][n] * sum over k in g of (x - zero[t]) (w - offset)
//   scale = x's scale[t] * weight's scale[n]
//
// Sums are int32 and exact: whoever makes a weight sees to it that they cannot exceed it. x is rows
// of codes, or rows of numbers, which become codes by their own range first.
struct LinearGroupedArgs {
  DType dtype;    // of residual, norm and out, and of x where it is numbers
  const void* x;  // [T, K] numbers, or null
  // [T, K] where x is null; not written. Where x is numbers, on a GPU: memory for their codes.
  QuantizedRows codes;
  const uint8_t* weight;      // [ceil(N/16), ceil(K/32), 64 bits]
  const float* scale;         // [N]
  const int32_t* totals;      // [N], the sum over all inputs of multiplier * (w - offset)
  const uint8_t* multiplier;  // [ceil(N/16), G, 16], or null: 1
  // [ceil(N/16), G, 16], multiplier * offset of each group, or null: no offsets
  const int32_t* offset;
  const float* bias;        // [N] or null
  const void* residual;     // [T, N] or null
  const void* norm_weight;  // [N] or null
  const void* norm_bias;    // [N] or null with it
  // [T, N]. Where only codes are wanted, that is without a LayerNorm: null on the CPU, and memory
  // for float32 results on a GPU.
  void* out;
  QuantizedRows out_codes;  // [T, N]; null codes: not wanted
  int32_t* code_sums;       // on a GPU, with offsets: memory for [T, G] integers
  int64_t x_row;            // stride of x
  int64_t residual_row;     // stride of residual
  int64_t rows;             // T
  int64_t inputs;           // K
  int64_t outputs;          // N
  int64_t groups;           // G; a group is K / G inputs, a multiple of 32 where G is not 1
  int32_t bits;             // 2, 3, 4, 6 or 8
  Activation activation;
  float eps;
};

void linear_grouped_cpu(const LinearGroupedArgs& args);
void linear_grouped_cuda(const LinearGroupedArgs& args, void* stream);

}  // namespace filbert
