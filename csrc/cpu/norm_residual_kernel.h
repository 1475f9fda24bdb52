#pragma once

#include "args/norm_residual.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct NormResidualKernel {
  int64_t (*scratch)(const NormResidualArgs& args);  // bytes for a thread
  void (*rows)(const NormResidualArgs& args, int64_t begin, int64_t end, void* scratch);
};
FILBERT_DECLARE_COPIES(NormResidualKernel, norm_residual)

}  // namespace filbert
