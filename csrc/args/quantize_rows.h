#pragma once

#include "args/common.h"

namespace filbert {

// Rows of 8-bit codes, and what they stand for: scale[t] * (codes[t][k] - zero[t]). A row that
// holds NaN or infinities has the scale NaN.
struct QuantizedRows {
  uint8_t* codes;     // [T, K]
  float* scale;       // [T]
  int32_t* zero;      // [T], from 0 to 255
  int64_t codes_row;  // stride of codes
};

struct QuantizeRowsArgs {
  DType dtype;
  const void* x;        // [T, K]
  const float* scale;   // [1], of all rows, or null: each row by its own range
  const int32_t* zero;  // [1] with scale
  QuantizedRows out;
  int64_t x_row;  // stride of x; rows are contiguous
  int64_t rows;   // T
  int64_t width;  // K
};

void quantize_rows_cpu(const QuantizeRowsArgs& args);
void quantize_rows_cuda(const QuantizeRowsArgs& args, void* stream);

}  // namespace filbert
