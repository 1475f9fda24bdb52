// How each CUDA kernel is launched, as a pure function of the call's shape and the GPU's size:
// tested and printed without a GPU, and free of anything only the GPU knows. In particular nothing
// here looks at sequence lengths, so a captured graph stays right when they change.
#pragma once

#include <cstdint>

#include "args/attn_tiles.h"
#include "args/attn_varlen.h"

namespace filbert {
namespace cuda {

struct LaunchPlan {
  int64_t blocks;
  int64_t threads;
  int64_t shared_bytes;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Blocks per multiprocessor of a kernel whose blocks stride over their work: more than can run at
// once, so that the hardware balances them.
constexpr int64_t kBlocksPerMultiprocessor = 16;

constexpr int64_t kAttnThreads = 128;

// The instantiation a head dimension runs on: the next of 32, 64 and 128, missing columns zero.
constexpr int64_t attn_tile_dim(int64_t dim) { return dim <= 32 ? 32 : dim <= 64 ? 64 : 128; }

// Q, K and V of one tile of rows; K and V of a longer sequence pass through in blocks of half.
constexpr int64_t attn_shared_bytes(int64_t tile_dim) { return 3 * kTileRows * tile_dim * 2; }

// The float32 kernel: 16 query rows, 32 keys and values, and the weights between them.
constexpr int64_t kAttnF32Rows = 16, kAttnF32Keys = 32;
constexpr int64_t attn_f32_shared_bytes(int64_t dim) {
  return (kAttnF32Rows * (dim + kAttnF32Keys) + 2 * kAttnF32Keys * (dim + 4)) * 4;
}

// A block for each item there can be; those past the end of the list return at once.
inline LaunchPlan plan_attn_varlen(const AttnVarlenArgs& args) {
  const int64_t shared = args.dtype == DType::kFloat32 ? attn_f32_shared_bytes(args.dim)
                                                       : attn_shared_bytes(attn_tile_dim(args.dim));
  return {args.rows_q == 0 ? 0 : args.capacity * args.heads, kAttnThreads, shared};
}

// One block: the list is a counting sort, and its bins live in that block's shared memory.
constexpr int kTileBins = 66;
inline LaunchPlan plan_attn_tiles(const AttnTilesArgs&) { return {1, 256, 2 * kTileBins * 4}; }

// A kernel that gives each warp a row at a time, or each thread some bytes.
inline LaunchPlan plan_strided(int64_t units, int64_t units_per_block, int64_t threads,
                               int64_t multiprocessors, int64_t shared_bytes = 0) {
  const int64_t blocks = ceil_div(units, units_per_block);
  return {least(blocks, multiprocessors * kBlocksPerMultiprocessor), threads, shared_bytes};
}

}  // namespace cuda
}  // namespace filbert
