// What the kernels of low rank share.
#pragma once

#include "args/linear_dense.h"

namespace filbert {

// A factor's product as linear_dense's, without what it reads and writes. It was packed with `held`
// inputs, and the first `inputs` are used.
inline LinearDenseArgs factor_product(DType dtype, DType weight_dtype, const void* weight,
                                      int64_t inputs, int64_t held, int64_t outputs) {
  LinearDenseArgs one{};
  one.dtype = dtype;
  one.weight_dtype = weight_dtype;
  one.weight = weight;
  one.x_row = one.inputs = inputs;
  one.weight_inputs = held;
  one.outputs = outputs;
  one.activation = Activation::kNone;
  return one;
}

// Inner steps that a packed weight has.
inline int64_t packed_steps(DType dtype, int64_t inputs) {
  return dtype == DType::kBFloat16 ? (inputs + 1) / 2 * 2 : inputs;
}

inline int64_t panels_of(const LinearDenseArgs& one) {
  return (one.outputs + kDensePanel - 1) / kDensePanel;
}

}  // namespace filbert
