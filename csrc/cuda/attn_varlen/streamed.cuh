// Attention over any number of keys, one head: they stream through shared memory in blocks of 64,
// the next one loading while this one is multiplied, with a running maximum and sum.
#pragma once

#include "cuda/attention/products.cuh"

namespace filbert {
namespace cuda {

constexpr int kKeyBlock = 64;    // keys that are loaded at a time
constexpr int kKeysAtOnce = 32;  // of them multiplied: with 64 the scores of two strips would spill

// Whether any query of the strip at `row` can see any of `keys` keys from `key`.
__device__ __forceinline__ bool window_meets(const AttnVarlenArgs& args, const AttnWork& work,
                                             int row, int key, int keys) {
  const int64_t first = work.place + row, last = first + kStrip - 1;
  return (args.window_left < 0 || key + keys > first - args.window_left) &&
         (args.window_right < 0 || key <= last + args.window_right);
}

// Of a warp: the outputs of kHeld strips, kWarps strips apart.
template <typename T, int kDim, bool kBiased, int kHeld>
struct HeldStrips {
  static constexpr int kApart = kWarps * kStrip, kTiles = kKeysAtOnce / 8;
  float out[kHeld][kDim / 8][4] = {};
  RowStats stats[kHeld];

  // Adds a block of keys to kStrips strips from kFrom on, of which `row` is the first one's. `keys`
  // are left, this block's included.
  template <int kFrom, int kStrips>
  __device__ __forceinline__ void add(const AttnVarlenArgs& args, const AttnWork& work, int row,
                                      SharedRows<kDim> q, SharedRows<kDim> k, SharedRows<kDim> v,
                                      int keys) {
#pragma unroll 1
    for (int at = 0; at < kKeyBlock && at < keys; at += kKeysAtOnce) {
      add_some<kFrom, kStrips>(args, work, row, q, k.from(at), v.from(at), keys - at);
    }
  }

 private:
  // All of kKeysAtOnce keys are multiplied with the queries; what is past the last one may be
  // anything, and is hidden. Values are zeros up to the next multiple of 16.
  template <int kFrom, int kStrips>
  __device__ __forceinline__ void add_some(const AttnVarlenArgs& args, const AttnWork& work,
                                           int row, SharedRows<kDim> q, SharedRows<kDim> k,
                                           SharedRows<kDim> v, int keys) {
    const Lane lane(thread_read_anew());  // where fragments lie is worked out again each time
    const ScoreScale scale = score_scale<kBiased>(args);
    float scores[kStrips][kTiles][4];
    multiply_queries_keys<T, kDim>(scores, q, row, kApart, k, lane);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if (!kBiased) continue;
      add_biases(scores[s], args, work, work.head, row + s * kApart, work.keys - keys, lane);
    }
    if (keys < kKeysAtOnce) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) hide_past<0, kTiles>(scores[s], keys, lane);
    }
    float rescale[kStrips][2];
    bool scaled = false;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      stats[kFrom + s].template update<true>(scores[s], keys, scale, rescale[s]);
      scaled = scaled || rescale[s][0] != 1.0f || rescale[s][1] != 1.0f;
    }
    if (__ballot_sync(0xffffffffu, scaled)) {  // by 1 nothing changes
#pragma unroll
      for (int i = 0; i < kStrips * kDim / 2; ++i) {
        out[kFrom + i / (kDim / 2)][i % (kDim / 2) / 4][i % 4] *=
            rescale[i / (kDim / 2)][i % 4 / 2];
      }
    }
    multiply_weights_values<T, kDim, kFrom>(out, scores, v, keys, lane);
  }
};

// A warp keeps the outputs of kHeld strips at a time, so rows beyond kWarps * kHeld strips are
// another pass over the keys.
template <typename T, int kDim, bool kBiased>
__device__ __forceinline__ void attend_streamed(const AttnVarlenArgs& args, const AttnWork& work,
                                                uint32_t memory) {
  constexpr int kHeld = kDim <= 64 || !kBiased ? 2 : 1;
  constexpr int kApart = kWarps * kStrip;
  constexpr bool kOnePass = kHeld * kApart == kAttnTileRows;
  const SharedRows<kDim> q{memory};
  const SharedRows<kDim> k = q.from(kAttnTileRows), v = q.from(2 * kAttnTileRows);
  const int head = work.head;

  // Blocks are told apart by the keys that are left, that one's included: of two numbers that a
  // warp has to keep, this is one, and where the keys end the other.
  const int end = work.k_row + work.keys;
  const auto half_of = [](int left) { return (left - 1) & kKeyBlock; };
  const auto fetch_block = [&](int left) {
    const int row = end - left;
    fetch_block_rows<T, kKeyBlock>(
        k.from(half_of(left)), GlobalRows<T>(args.k, row, args.k_row, head, args.k_head, args.dim),
        left);
    fetch_block_rows<T, kKeyBlock>(
        v.from(half_of(left)), GlobalRows<T>(args.v, row, args.v_row, head, args.v_head, args.dim),
        left);
    cp_async_commit();
  };

  fetch_rows<T>(q, GlobalRows<T>(args.q, work.q_row, args.q_row, head, args.q_head, args.dim),
                work.rows);
  int first = 0;
  do {
    HeldStrips<T, kDim, kBiased, kHeld> held;
    const int row = first + static_cast<int>(threadIdx.x) / 32 * kStrip;
    fetch_block(work.keys);
    for (int left = work.keys; left > 0; left -= kKeyBlock) {
      cp_async_wait<0>();
      __syncthreads();  // these keys are there, and nobody reads the ones before them any more
      if (left > kKeyBlock) fetch_block(left - kKeyBlock);
      const SharedRows<kDim> keys = k.from(half_of(left)), values = v.from(half_of(left));
      if constexpr (kBiased || kHeld == 1) {
        const auto sees = [&](int r) {
          return r < work.rows &&
                 (!kBiased || window_meets(args, work, r, work.keys - left, kKeyBlock));
        };
        if (sees(row)) held.template add<0, 1>(args, work, row, q, keys, values, left);
        if (kHeld == 2 && sees(row + kApart)) {
          held.template add<kHeld - 1, 1>(args, work, row + kApart, q, keys, values, left);
        }
      } else if (row + kApart < work.rows) {
        held.template add<0, kHeld>(args, work, row, q, keys, values, left);
      } else if (row < work.rows) {
        held.template add<0, 1>(args, work, row, q, keys, values, left);
      }
    }
    if (!kOnePass) __syncthreads();  // nobody reads the last keys any more
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      if (row + s * kApart < work.rows) {
        held.stats[s].total();
        write_strip<T, kDim>(args, work, head, row + s * kApart, held.out[s], held.stats[s],
                             score_scale<kBiased>(args), q, Lane(thread_read_anew()));
      }
    }
    first += kHeld * kApart;
  } while (!kOnePass && first < work.rows);
}

}  // namespace cuda
}  // namespace filbert
