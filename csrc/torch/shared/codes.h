// What the bindings of operators over rows of 8-bit codes share.
#pragma once

#include "args/quantize_rows.h"
#include "torch/shared/device.h"

namespace filbert {

// Rows of codes that an operator returns.
struct CodeTensors {
  Tensor codes, scale, zero;

  CodeTensors(const Tensor& like, int64_t rows, int64_t width)
      : codes(torch::stable::new_empty(like, {rows, width}, ScalarType::Byte)),
        scale(torch::stable::new_empty(like, {rows}, ScalarType::Float)),
        zero(torch::stable::new_empty(like, {rows}, ScalarType::Int)) {}

  QuantizedRows write(Call& call) {
    return {call.write<uint8_t>(codes), call.write<float>(scale), call.write<int32_t>(zero),
            codes.size(1)};
  }
};

}  // namespace filbert
