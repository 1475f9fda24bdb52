#pragma once

#include "args/attn_binary.h"
#include "cuda/device/plan.h"

namespace filbert {
namespace cuda {

// attn_binary: a block takes some query rows of one sequence, and a warp a head of them.
constexpr int64_t kAttnBinaryWarps = 6;   // at most
constexpr int64_t kAttnBinaryKeys = 128;  // in shared memory at a time
// Head dimensions up to 64 run on tiles of two words, the others on four.
constexpr int64_t attn_binary_tile_words(int64_t dim) { return dim <= 64 ? 2 : 4; }
constexpr int64_t attn_binary_tile_rows(int64_t dim) { return dim <= 64 ? 32 : 16; }

// The warps of a block: all heads in as few turns as the bound allows, all turns of one size.
constexpr int64_t attn_binary_warps(int64_t heads) {
  return ceil_div(heads, ceil_div(heads, kAttnBinaryWarps));
}

// From one row of keys or values to the next, in pieces of 16 bytes: odd, so that eight rows' worth
// of one piece touch all banks.
constexpr int64_t attn_binary_row_pieces(int64_t warps, int64_t dim) {
  return ceil_div(warps * (dim / 32), 4) | 1;
}

inline LaunchPlan plan_attn_binary(const AttnBinaryArgs& args) {
  const int64_t warps = attn_binary_warps(args.heads), rows = attn_binary_tile_rows(args.dim);
  // No sequence is longer than all rows, whatever the hint says.
  const int64_t tiles = most(1, ceil_div(least(args.max_seqlen, args.rows), rows));
  const int64_t keys_and_values =
      2 * kAttnBinaryKeys * attn_binary_row_pieces(warps, args.dim) * 16;
  const int64_t transposed = warps * attn_binary_tile_words(args.dim) * 32 * 16;
  const int64_t table = args.table ? (args.dim + 1) * 8 : 0;
  return {(args.sequences + 1) * tiles, 32 * warps,
          keys_and_values + transposed + table + rows * 4};
}

}  // namespace cuda
}  // namespace filbert
