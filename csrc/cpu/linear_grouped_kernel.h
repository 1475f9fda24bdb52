#pragma once

#include "args/linear_grouped.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

// Rows of codes times panels, for a block of rows.
struct GroupedBlock {
  QuantizedRows codes;  // of the block's first row
  float* wide;          // [rows, N] results as float32, or null: out gets them
  int64_t row_begin, row_end, panel_begin, panel_end;
};

struct LinearGroupedKernel {
  int64_t tile_rows;                                                // of a register tile, at most
  int64_t (*scratch)(const LinearGroupedArgs& args, int64_t rows);  // bytes for a thread
  void (*block)(const LinearGroupedArgs& args, const GroupedBlock& block, void* scratch);
};
FILBERT_DECLARE_COPIES(LinearGroupedKernel, linear_grouped)

}  // namespace filbert
