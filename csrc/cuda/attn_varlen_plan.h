#pragma once

#include "args/attn_tiles.h"
#include "args/attn_varlen.h"
#include "cuda/device/plan.h"

namespace filbert {
namespace cuda {

constexpr int64_t kAttnThreads = 128;

// The instantiation a head dimension runs on: the next of 32, 64 and 128, missing columns zero.
constexpr int64_t attn_tile_dim(int64_t dim) { return dim <= 32 ? 32 : dim <= 64 ? 64 : 128; }

// Q, K and V of one tile of rows; K and V of a longer sequence pass through in blocks of half.
constexpr int64_t attn_shared_bytes(int64_t tile_dim) { return 3 * kAttnTileRows * tile_dim * 2; }

// The float32 kernel: 16 query rows, 32 keys and values, and the weights between them.
constexpr int64_t kAttnF32Rows = 16, kAttnF32Keys = 32;
constexpr int64_t attn_f32_shared_bytes(int64_t dim) {
  return (kAttnF32Rows * (dim + kAttnF32Keys) + 2 * kAttnF32Keys * (dim + 4)) * 4;
}

// The most blocks that self-attention over `sequences` sequences of `rows` rows together can need,
// whatever their lengths; one more sequence are the rows that none owns.
//
// A sequence of n rows needs f(n) blocks. f steps up at 1, 17 and 33 rows, where fewer heads share
// a block (heads_per_block in attn_work.cuh), and every 128 rows from 129 on. A line a + b n that
// is nowhere below f bounds the sum of all f(n) by a (sequences + 1) + b rows. With b >= heads /
// 128 and no corner of the first four steps above it, it is nowhere below f. The tightest lines go
// through two neighbouring corners of the hull of f, which are 0, 1, 33, 129, 257, ...; the least
// of their bounds is taken. A slope is an integer of 384ths of a block.
constexpr int64_t attn_self_blocks(int64_t rows, int64_t sequences, int64_t heads) {
  constexpr int64_t kUnit = 3 * kAttnTileRows;
  const int64_t fours = ceil_div(heads, 4), twos = ceil_div(heads, 2);
  const int64_t corner_rows[] = {1, 17, 33, kAttnTileRows + 1};
  const int64_t corner_blocks[] = {fours, twos, heads, 2 * heads};
  const int64_t slopes[] = {
      kUnit * fours,                          // 0 to 1: fewer rows than sequences
      most(12 * (heads - fours), 3 * heads),  // 1 to 33: short texts
      4 * heads,                              // 33 to 129
      3 * heads,                              // from 129 on: long texts
  };
  int64_t bound = (rows / kAttnTileRows + sequences + 1) * heads;
  for (const int64_t slope : slopes) {
    int64_t start = 0;
    for (int i = 0; i < 4; ++i) {
      start = most(start, kUnit * corner_blocks[i] - slope * corner_rows[i]);
    }
    bound = least(bound, ((sequences + 1) * start + slope * rows) / kUnit);
  }
  return bound;
}

// A block for each item there can be; those past the end of the list return at once.
inline LaunchPlan plan_attn_varlen(const AttnVarlenArgs& args) {
  const int64_t shared = args.dtype == DType::kFloat32 ? attn_f32_shared_bytes(args.dim)
                                                       : attn_shared_bytes(attn_tile_dim(args.dim));
  const int64_t blocks = args.self_attention
                             ? attn_self_blocks(args.rows_q, args.sequences, args.heads)
                             : args.capacity * args.heads;
  return {args.rows_q == 0 ? 0 : blocks, kAttnThreads, shared};
}

}  // namespace cuda
}  // namespace filbert
