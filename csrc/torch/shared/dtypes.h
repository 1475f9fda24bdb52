// The dtype of results that no operand has.
#pragma once

#include "torch/shared/device.h"

namespace filbert {

inline DType dtype_named(const std::string& name, const char* op) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  check(kOnGpu && name == "float16", op, "dtype", name,
        kOnGpu ? "float16, bfloat16 or float32" : "float32 or bfloat16 on the CPU",
        "dtype=torch.float32");
  return DType::kFloat16;
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

}  // namespace filbert
