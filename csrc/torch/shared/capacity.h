// Rows that a product returns, in memory of few sizes.
#pragma once

#include "torch/shared/common.h"

namespace filbert {

// [rows, width] in memory for one of 8 numbers of rows to an octave. Packed batches have any number
// of rows, and an allocator that sees hundreds of sizes keeps ever more.
inline Tensor empty_rows(const Tensor& like, int64_t rows, int64_t width, ScalarType type) {
  int64_t step = 4;
  while (16 * step < rows) step *= 2;
  const int64_t capacity = (rows + step - 1) / step * step;
  Tensor out = torch::stable::new_empty(like, {capacity, width}, type);
  return capacity == rows ? out : torch::stable::narrow(out, 0, 0, rows);
}

}  // namespace filbert
