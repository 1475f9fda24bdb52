#pragma once

#include "args/linear_dense.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct LinearDenseKernel {
  int64_t tile_rows;                                              // of a register tile
  int64_t (*rows)(const LinearDenseArgs& args);                   // of a block, at most
  int64_t (*scratch)(const LinearDenseArgs& args, int64_t rows);  // bytes for a thread
  void (*block)(const LinearDenseArgs& args, int64_t row_begin, int64_t row_end,
                int64_t panel_begin, int64_t panel_end, void* scratch);
};
FILBERT_DECLARE_COPIES(LinearDenseKernel, linear_dense)

}  // namespace filbert
