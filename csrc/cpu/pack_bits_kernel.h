#pragma once

#include "args/pack_bits.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct PackBitsKernel {
  void (*rows)(const PackBitsArgs& args, int64_t begin, int64_t end);
  // sums[r] = the sum of row r's codes, its planes `stride` words apart
  void (*sum_planes)(const uint32_t* words, int64_t stride, int64_t planes, int64_t rows,
                     int64_t row_words, int32_t* sums);
};
FILBERT_DECLARE_COPIES(PackBitsKernel, pack_bits)

}  // namespace filbert
