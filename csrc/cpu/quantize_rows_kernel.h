#pragma once

#include "args/quantize_rows.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct QuantizeRowsKernel {
  void (*rows)(const QuantizeRowsArgs& args, int64_t begin, int64_t end);
};
FILBERT_DECLARE_COPIES(QuantizeRowsKernel, quantize_rows)

}  // namespace filbert
