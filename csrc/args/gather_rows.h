#pragma once

#include "args/common.h"

namespace filbert {

// out[t] = x[index[t]], or zeros where index[t] is no row of x. Rows are bytes: any dtype.
struct GatherRowsArgs {
  const void* x;         // [R, row_bytes]
  const int64_t* index;  // [T]
  void* out;             // [T, row_bytes], dense
  int64_t rows;          // T
  int64_t x_rows;        // R
  int64_t row_bytes;
  int64_t x_row_stride;  // bytes from one row of x to the next
};

void gather_rows_cpu(const GatherRowsArgs& args);
void gather_rows_cuda(const GatherRowsArgs& args, void* stream);

}  // namespace filbert
