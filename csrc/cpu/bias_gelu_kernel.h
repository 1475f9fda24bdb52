#pragma once

#include "args/bias_gelu.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct BiasGeluKernel {
  void (*rows)(const BiasGeluArgs& args, int64_t begin, int64_t end);
};
FILBERT_DECLARE_COPIES(BiasGeluKernel, bias_gelu)

}  // namespace filbert
