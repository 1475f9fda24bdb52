// Attention over at most 32 keys: two strips of two heads, or one of four, and a strip to a warp.
#pragma once

#include "cuda/attention/products.cuh"

namespace filbert {
namespace cuda {

constexpr int kShortKeys = 32;

// One strip over all of its keys, kSteps times 16 of them.
template <typename T, int kDim, bool kBiased, int kSteps>
__device__ __forceinline__ void attend_strip(const AttnVarlenArgs& args, const AttnWork& work,
                                             int head, int row, SharedRows<kDim> q,
                                             SharedRows<kDim> k, SharedRows<kDim> v,
                                             const Lane& lane) {
  constexpr int kTiles = 2 * kSteps;
  const ScoreScale scale = score_scale<kBiased>(args);
  float scores[1][kTiles][4], rescale[2];  // of nothing yet
  float out[1][kDim / 8][4] = {};
  RowStats stats;
  multiply_queries_keys<T, kDim>(scores, q, row, 0, k, lane);
  if (kBiased) add_biases(scores[0], args, work, head, row, 0, lane);
  hide_past<kTiles - 2, kTiles>(scores[0], work.keys, lane);
  stats.update<true>(scores[0], work.keys, scale, rescale);
  stats.total();
  multiply_weights_values<T, kDim>(out, scores, v, kSteps * kStep, lane);
  write_strip<T, kDim>(args, work, head, row, out[0], stats, scale, q, lane);
}

// Rows of Q, K and V lie where attend_resident has them. A warp copies the queries of its own strip
// and, in turns with the other warps of its head, 16 keys and values at a time.
template <typename T, int kDim, bool kBiased>
__device__ __forceinline__ void attend_short(const AttnVarlenArgs& args, const AttnWork& work,
                                             uint32_t memory) {
  const Lane lane;
  const int others = work.slots == 2 ? 1 : 0;  // warps of the head beside this one
  const int slot = lane.warp >> others, row = (lane.warp & others) * kStrip;
  const int head = work.head + slot, first = slot * (static_cast<int>(kAttnTileRows) / work.slots);
  const SharedRows<kDim> q = SharedRows<kDim>{memory}.from(first);
  const SharedRows<kDim> k = q.from(kAttnTileRows), v = q.from(2 * kAttnTileRows);
  const bool active = slot < work.heads;
  if (active) {
    fetch_strip<T>(q.from(row),
                   GlobalRows<T>(args.q, work.q_row + row, args.q_row, head, args.q_head, args.dim),
                   work.rows - row, lane);
    int key = row;
    do {  // without any keys too: what is multiplied has to be zeros
      fetch_strip<T>(
          k.from(key),
          GlobalRows<T>(args.k, work.k_row + key, args.k_row, head, args.k_head, args.dim),
          work.keys - key, lane);
      fetch_strip<T>(
          v.from(key),
          GlobalRows<T>(args.v, work.k_row + key, args.v_row, head, args.v_head, args.dim),
          work.keys - key, lane);
      key += (1 + others) * kStrip;
    } while (key < work.keys);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();  // the other warp's keys are there too
  if (!active || row >= work.rows) return;
  if (work.keys <= kStep) {
    attend_strip<T, kDim, kBiased, 1>(args, work, head, row, q, k, v, lane);
  } else {
    attend_strip<T, kDim, kBiased, kShortKeys / kStep>(args, work, head, row, q, k, v, lane);
  }
}

}  // namespace cuda
}  // namespace filbert
