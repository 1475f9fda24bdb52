// A factor's product as linear_dense's, without what it reads and writes.
#pragma once

#include "args/linear_dense.h"

namespace filbert {

inline LinearDenseArgs factor_product(DType dtype, DType weight_dtype, const void* weight,
                                      int64_t inputs, int64_t outputs) {
  LinearDenseArgs one{};
  one.dtype = dtype;
  one.weight_dtype = weight_dtype;
  one.weight = weight;
  one.x_row = one.inputs = inputs;
  one.outputs = outputs;
  one.activation = Activation::kNone;
  return one;
}

inline int64_t panels_of(const LinearDenseArgs& one) {
  return (one.outputs + kDensePanel - 1) / kDensePanel;
}

}  // namespace filbert
