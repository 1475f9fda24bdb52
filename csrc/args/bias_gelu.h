#pragma once

#include "args/common.h"

namespace filbert {

// x = GELU(x + bias), in place.
struct BiasGeluArgs {
  DType dtype;       // of x and bias
  void* x;           // [T, N], dense
  const void* bias;  // [N] or null
  int64_t rows;      // T
  int64_t width;     // N
  bool tanh;         // the tanh form instead of the exact erf form
};

void bias_gelu_cpu(const BiasGeluArgs& args);
void bias_gelu_cuda(const BiasGeluArgs& args, void* stream);

}  // namespace filbert
