#pragma once

#include "args/linear_binary.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

// One unit of work: that many rows and outputs.
constexpr int64_t kBinaryRows = 128;
constexpr int64_t kBinaryColumns = 64;

struct LinearBinaryKernel {
  int64_t (*scratch)(const LinearBinaryArgs& args);  // bytes for a thread
  // Rows [row_begin, row_end), and outputs from kBinaryColumns * block_begin on.
  void (*block)(const LinearBinaryArgs& args, int64_t row_begin, int64_t row_end,
                int64_t block_begin, int64_t block_end, void* scratch);
};
FILBERT_DECLARE_COPIES(LinearBinaryKernel, linear_binary)

}  // namespace filbert
