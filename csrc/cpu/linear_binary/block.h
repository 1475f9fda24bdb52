// A block of rows and outputs of linear_binary: what the ways of counting share.
#pragma once

#include "cpu/linear_binary_kernel.h"
#include "cpu/simd/bits.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int kColumns = kBinaryColumns;      // outputs of a block: 64
constexpr int kVectors = kColumns / kLanes;   // of 32-bit lanes
constexpr int64_t kTileWords = kTileOutputs;  // words of one row of a weight tile

// A block of rows and outputs. counts is [rows][kColumns] int32.
struct Block {
  const LinearBinaryArgs& args;
  int64_t row_begin, rows;
  int64_t column;  // first output

  const uint32_t* row(int64_t r, int plane) const {
    return args.words + plane * args.plane_stride + (row_begin + r) * args.row_stride;
  }
  // Weight tile i of the block. Past the last one it repeats: what is counted there is not stored.
  const uint32_t* tile(int i) const {
    const int64_t last = (args.outputs - 1) / kTileOutputs;
    const int64_t at = column / kTileOutputs + i;
    return args.weight + (at < last ? at : last) * args.row_words * kTileWords;
  }
};

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
