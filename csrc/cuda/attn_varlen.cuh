// Packed variable-length attention on tensor cores (mma.m16n8k16, sums in float32).
//
// A block takes one item of the work list: up to 128 query rows of one sequence, for one head, or
// for two or four heads of a short one. Each of its four warps owns strips of 16 query rows.
//   - Up to 32 keys and rows: a strip to a warp, unrolled. (attend_short)
//   - Up to 128 keys: all of K and V lie in shared memory, a warp holds the scores of a whole strip
//     in registers, and the softmax is one pass. (attend_resident)
//   - More: K and V stream through shared memory. (attend_streamed)
// Keys are counted in steps of 16, rows in strips of 16: a text of 20 tokens costs 2 x 2 tiles.
//
// Rows past a sequence's end belong to another sequence. They are never loaded: shared memory gets
// zeros in their place, so that not even 0 x Inf can reach a result.
#pragma once

#include "cuda/attention/products.cuh"
#include "cuda/attn_varlen/short.cuh"
#include "cuda/attn_varlen/streamed.cuh"

namespace filbert {
namespace cuda {

// Blocks that share a multiprocessor: what shared memory allows at 128 columns, and else as many as
// leave each thread the registers it needs. (As of compute capability 9.0; others have less.)
template <int kDim, bool kBiased>
constexpr int kAttnBlocks = kBiased || kDim > 64 ? 2
                            : kDim == 64         ? 3
                                                 : 4;

// Up to 128 keys: one pass. The block's memory is shared by `slots` heads, each with its own
// 128 / slots rows of Q, K and V; the strips of all heads are dealt out to the warps.
template <typename T, int kDim, bool kBiased>
__device__ __forceinline__ void attend_resident(const AttnVarlenArgs& args, const AttnWork& work,
                                                uint32_t memory) {
  const Lane lane;
  const SharedRows<kDim> q{memory};
  const SharedRows<kDim> k = q.from(kAttnTileRows), v = q.from(2 * kAttnTileRows);
  const int slot_rows = static_cast<int>(kAttnTileRows) / work.slots;
  for (int slot = 0; slot < work.heads; ++slot) {
    const int head = work.head + slot;
    fetch_rows<T>(q.from(slot * slot_rows),
                  GlobalRows<T>(args.q, work.q_row, args.q_row, head, args.q_head, args.dim),
                  work.rows);
    fetch_rows<T>(k.from(slot * slot_rows),
                  GlobalRows<T>(args.k, work.k_row, args.k_row, head, args.k_head, args.dim),
                  work.keys);
  }
  cp_async_commit();
  for (int slot = 0; slot < work.heads; ++slot) {
    fetch_rows<T>(
        v.from(slot * slot_rows),
        GlobalRows<T>(args.v, work.k_row, args.v_row, work.head + slot, args.v_head, args.dim),
        work.keys);
  }
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();  // Q and K are there; V may still be on its way

  const int strips = larger(1, (work.rows + kStrip - 1) / kStrip);
  const int units = strips * work.heads;
  const ScoreScale scale = score_scale<kBiased>(args);
  bool values_there = false;
  for (int unit = lane.warp; unit < units || !values_there; unit += kWarps) {
    constexpr int kTiles = static_cast<int>(kAttnTileRows) / 8;
    float scores[1][kTiles][4];
    RowStats stats;
    const int slot = unit / strips, row = unit % strips * kStrip;
    const int first = slot * slot_rows, head = work.head + slot;
    if (unit < units) {
      float rescale[2];  // of nothing yet
      multiply_queries_some_keys<T, kDim>(scores[0], q.from(first), row, k.from(first), work.keys,
                                          lane);
      if (kBiased) add_biases(scores[0], args, work, head, row, 0, lane);
      hide_in_last_step(scores[0], work.keys, lane);
      stats.update<false>(scores[0], work.keys, scale, rescale);
      stats.total();
    }
    if (!values_there) {  // once for every warp, with or without a strip
      cp_async_wait<0>();
      __syncthreads();
      values_there = true;
    }
    if (unit < units) {
      float out[1][kDim / 8][4] = {};
      multiply_weights_values<T, kDim>(out, scores, v.from(first), work.keys, lane);
      write_strip<T, kDim>(args, work, head, row, out[0], stats, scale, q.from(first), lane);
    }
  }
}

// One item to a block, and no loop over items: with one the compiler keeps what both paths could
// share in registers, and spills. Blocks past the end of the list have nothing to do.
template <typename T, int kDim, bool kBiased>
__global__ void __launch_bounds__(kAttnThreads, kAttnBlocks<kDim, kBiased>)
    attn_varlen_kernel(const __grid_constant__ AttnVarlenArgs args) {
  const AttnList list(args);
  const int index = blockIdx.x;
  if (index >= list.count()) return;
  const AttnWork work = list.at(args, index);
  const uint32_t memory = shared_address(shared_memory());
  if (work.slots > 1 && work.keys <= kShortKeys) {
    attend_short<T, kDim, kBiased>(args, work, memory);
  } else if (work.keys <= kAttnTileRows) {
    attend_resident<T, kDim, kBiased>(args, work, memory);
  } else {
    attend_streamed<T, kDim, kBiased>(args, work, memory);
  }
}

}  // namespace cuda
}  // namespace filbert
