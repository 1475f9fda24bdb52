// The activation that a product applies to its sums, by name.
#pragma once

#include "args/activation.h"
#include "torch/shared/common.h"

namespace filbert {

inline Activation activation_of(const std::string& name, const char* op) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  check(false, op, "activation", name, "none, gelu, gelu_tanh, relu or silu",
        "applying any other to the result");
  return Activation::kNone;
}

}  // namespace filbert
