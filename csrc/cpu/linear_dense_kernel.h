#pragma once

#include "args/linear_dense.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct LinearDenseKernel {
  int64_t tile_rows;                                              // of a register tile
  int64_t block_steps;                                            // of one chain of additions
  int64_t (*rows)(const LinearDenseArgs& args);                   // of a block, at most
  int64_t (*scratch)(const LinearDenseArgs& args, int64_t rows);  // bytes for a thread
  void (*block)(const LinearDenseArgs& args, int64_t row_begin, int64_t row_end,
                int64_t panel_begin, int64_t panel_end, void* scratch);
  // A product by parts, one call for each block_steps of the inner steps, from the first on. args
  // have a part: its inputs, x with these alone, and the weight from there on. begin: the sums
  // become those of this part, else it is added. sums: [rows, N rounded up to panels], in an order
  // of the kernel's own.
  void (*add)(const LinearDenseArgs& args, int64_t rows, bool begin, float* sums, void* scratch);
  // What became of them: rows of act(sums + bias) + residual, to out.
  void (*store)(const LinearDenseArgs& args, int64_t rows, const float* sums);
};
FILBERT_DECLARE_COPIES(LinearDenseKernel, linear_dense)

}  // namespace filbert
