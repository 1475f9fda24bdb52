// Packed variable-length attention on tensor cores (mma.m16n8k16, sums in float32).
//
// A block takes one item of the work list: up to 128 query rows of one sequence, for one head, or
// for two or four heads of a short one. Each of its four warps owns strips of 16 query rows.
//   - Up to 128 keys: all of K and V lie in shared memory, a warp holds the scores of a whole strip
//     in registers, and the softmax is one pass. (attend_resident)
//   - More: K and V stream through shared memory in blocks of 64 keys, the next one loading while
//     this one is multiplied, with a running maximum and sum. (attend_streamed)
// Keys are counted in steps of 16, rows in strips of 16: a text of 20 tokens costs 2 x 2 tiles.
//
// Rows past a sequence's end belong to another sequence. They are never loaded: shared memory gets
// zeros in their place, so that not even 0 x Inf can reach a result.
#pragma once

#include "cuda/attn_rows.cuh"
#include "cuda/attn_softmax.cuh"
#include "cuda/attn_work.cuh"
#include "cuda/launch_plan.h"

namespace filbert {
namespace cuda {

// Blocks that share a multiprocessor: what shared memory allows at 128 columns, and else as many as
// leave each thread the registers it needs. (As of compute capability 9.0; others have less.)
template <int kDim, bool kBiased>
constexpr int kAttnBlocks = kDim <= 64 && !kBiased ? 3 : 2;

constexpr int kWarps = 4;
constexpr int kStep = 16;      // keys of one mma
constexpr int kKeyBlock = 64;  // keys that stream through shared memory at a time

// scores[n] = Q K^T of the strip at `row` and keys 8 n .. 8 n + 7, for the first `keys` keys; 0 in
// tiles past them.
template <typename T, int kDim, int kTiles>
__device__ __forceinline__ void multiply_queries_keys(float (&scores)[kTiles][4],
                                                      SharedRows<kDim> q, int row,
                                                      SharedRows<kDim> k, int keys,
                                                      const Lane& lane) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[4];
    load_queries(a, q, row, step, lane);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (n * 8 < keys) {
        uint32_t b[4];
        load_keys(b, k, n * 8, step, lane);
        mma_16816<T>(scores[n], a, b[0], b[1]);
        mma_16816<T>(scores[n + 1], a, b[2], b[3]);
      }
    }
  }
}

// Scales, adds biases, and hides what is past the last key. Tile 0 begins with key `first_key`.
template <bool kBiased, int kTiles>
__device__ __forceinline__ void finish_scores(float (&scores)[kTiles][4],
                                              const AttnVarlenArgs& args, const AttnWork& work,
                                              int head, int row, int first_key, const Lane& lane) {
  const int keys = work.keys - first_key;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = multiply_rn(scores[n][i], args.scale);
  }
  if (kBiased) {
    const ScoreBias bias(args, work, head);
    const int place = work.place + row + lane.group;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = n * 8 + lane.column + i % 2;
        if (key < keys) {
          scores[n][i] = bias.apply(scores[n][i], place + i / 2 * 8, first_key + key);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n % 2 == 1 && n * 8 >= keys) {  // computed beside the last tile; Inf x 0 may be in it
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
    }
    if (n * 8 < keys && keys < n * 8 + 8) {  // the tile with the last key in it
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + lane.column + i % 2 >= keys) scores[n][i] = -INFINITY;
      }
    }
  }
}

// Weights as operands A, 16 keys each: two tiles of C are one tile of A.
template <typename T, int kTiles>
__device__ __forceinline__ void pack_weights(uint32_t (&a)[kTiles / 2][4],
                                             const float (&weights)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    a[n / 2][n % 2 * 2] = pack2<T>(weights[n][0], weights[n][1]);
    a[n / 2][n % 2 * 2 + 1] = pack2<T>(weights[n][2], weights[n][3]);
  }
}

// out += P V over the first `keys` keys.
template <typename T, int kDim, int kSteps>
__device__ __forceinline__ void multiply_weights_values(float (&out)[kDim / 8][4],
                                                        const uint32_t (&weights)[kSteps][4],
                                                        SharedRows<kDim> v, int keys,
                                                        const Lane& lane) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step * kStep < keys) {
#pragma unroll
      for (int column = 0; column < kDim / 16; ++column) {
        uint32_t b[4];
        load_values(b, v, step * kStep, column, lane);
        mma_16816<T>(out[2 * column], weights[step], b[0], b[1]);
        mma_16816<T>(out[2 * column + 1], weights[step], b[2], b[3]);
      }
    }
  }
}

// Divides by the sums and writes the strip's rows of `out` and `lse`. `staging` is the strip's own
// rows of Q, which nobody needs any more: fragments go there so that rows leave in whole pieces.
template <typename T, int kDim>
__device__ __forceinline__ void write_strip(const AttnVarlenArgs& args, const AttnWork& work,
                                            int head, int row, const float (&out)[kDim / 8][4],
                                            const RowStats& stats, SharedRows<kDim> staging,
                                            const Lane& lane) {
  const float inverse[2] = {stats.inverse(0), stats.inverse(1)};
  __syncwarp();  // every lane has read its part of Q
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair =
          pack2<T>(out[n][2 * half] * inverse[half], out[n][2 * half + 1] * inverse[half]);
      store_shared_4(staging.at(row + lane.group + 8 * half, n) + lane.column * 2, pair);
    }
  }
  __syncwarp();
  constexpr int kPieces = SharedRows<kDim>::kPieces;
  T* to = static_cast<T*>(args.out) + head * args.out_head;
#pragma unroll
  for (int i = 0; i < kStrip * kPieces / 32; ++i) {
    const int r = row + (i * 32 + lane.id) / kPieces, piece = lane.id % kPieces;
    if (r < work.rows && piece * 8 < args.dim) {
      store_16(to + (work.q_row + r) * args.out_row + piece * 8,
               load_shared_16(staging.at(r, piece)));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + lane.group + 8 * half;
    if (lane.column == 0 && r < work.rows) {
      args.lse[head * args.rows_q + work.q_row + r] = stats.log_sum_exp(half);
    }
  }
}

// Up to 128 keys: one pass. The block's memory is shared by `slots` heads, each with its own
// 128 / slots rows of Q, K and V; the strips of all heads are dealt out to the warps.
template <typename T, int kDim, bool kBiased>
__device__ __forceinline__ void attend_resident(const AttnVarlenArgs& args, const AttnWork& work,
                                                uint32_t memory) {
  const Lane lane;
  const SharedRows<kDim> q{memory};
  const SharedRows<kDim> k = q.from(kTileRows), v = q.from(2 * kTileRows);
  const int slot_rows = static_cast<int>(kTileRows) / work.slots;
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
  bool values_there = false;
  for (int unit = lane.warp; unit < units || !values_there; unit += kWarps) {
    constexpr int kTiles = static_cast<int>(kTileRows) / 8;
    uint32_t weights[kTiles / 2][4];
    RowStats stats;
    const int slot = unit / strips, row = unit % strips * kStrip;
    const int first = slot * slot_rows, head = work.head + slot;
    if (unit < units) {
      float scores[kTiles][4], rescale[2];  // of nothing yet
      multiply_queries_keys<T, kDim>(scores, q.from(first), row, k.from(first), work.keys, lane);
      finish_scores<kBiased>(scores, args, work, head, row, 0, lane);
      stats.update(scores, work.keys, rescale);
      stats.total();
      pack_weights<T>(weights, scores);
    }
    if (!values_there) {  // once for every warp, with or without a strip
      cp_async_wait<0>();
      __syncthreads();
      values_there = true;
    }
    if (unit < units) {
      float out[kDim / 8][4] = {};
      multiply_weights_values<T, kDim>(out, weights, v.from(first), work.keys, lane);
      write_strip<T, kDim>(args, work, head, row, out, stats, q.from(first), lane);
    }
  }
}

// Whether any query of the strip at `row` can see any of `keys` keys from `key`.
__device__ __forceinline__ bool window_meets(const AttnVarlenArgs& args, const AttnWork& work,
                                             int row, int key, int keys) {
  const int64_t first = work.place + row, last = first + kStrip - 1;
  return (args.window_left < 0 || key + keys > first - args.window_left) &&
         (args.window_right < 0 || key <= last + args.window_right);
}

// Any number of keys, one head. A warp keeps the outputs of kHeld strips at a time (more do not fit
// in registers at 128 columns), so rows beyond kWarps * kHeld strips are another pass over the
// keys.
template <typename T, int kDim, bool kBiased>
__device__ __forceinline__ void attend_streamed(const AttnVarlenArgs& args, const AttnWork& work,
                                                uint32_t memory) {
  constexpr int kHeld = kDim <= 64 ? 2 : 1;
  constexpr int kTiles = kKeyBlock / 8;
  const Lane lane;
  const SharedRows<kDim> q{memory};
  const SharedRows<kDim> k = q.from(kTileRows), v = q.from(2 * kTileRows);
  const int head = work.head;
  const int blocks = (work.keys + kKeyBlock - 1) / kKeyBlock;
  const int strips = (work.rows + kStrip - 1) / kStrip;

  const auto fetch_block = [&](int block) {
    const int key = block * kKeyBlock, half = block % 2 * kKeyBlock;
    const int keys = smaller(kKeyBlock, work.keys - key), row = work.k_row + key;
    fetch_rows<T>(k.from(half), GlobalRows<T>(args.k, row, args.k_row, head, args.k_head, args.dim),
                  keys);
    fetch_rows<T>(v.from(half), GlobalRows<T>(args.v, row, args.v_row, head, args.v_head, args.dim),
                  keys);
  };

  fetch_rows<T>(q, GlobalRows<T>(args.q, work.q_row, args.q_row, head, args.q_head, args.dim),
                work.rows);
  for (int first = 0; first < strips; first += kWarps * kHeld) {
    float out[kHeld][kDim / 8][4] = {};
    RowStats stats[kHeld];
    fetch_block(0);
    cp_async_commit();
    for (int block = 0; block < blocks; ++block) {
      if (block + 1 < blocks) fetch_block(block + 1);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();  // this block of keys is there
      const int key = block * kKeyBlock, half = block % 2 * kKeyBlock;
      const int keys = smaller(kKeyBlock, work.keys - key);
#pragma unroll
      for (int held = 0; held < kHeld; ++held) {
        const int row = (first + lane.warp + held * kWarps) * kStrip;
        if (row < work.rows && (!kBiased || window_meets(args, work, row, key, keys))) {
          float scores[kTiles][4], rescale[2];
          uint32_t weights[kTiles / 2][4];
          multiply_queries_keys<T, kDim>(scores, q, row, k.from(half), keys, lane);
          finish_scores<kBiased>(scores, args, work, head, row, key, lane);
          stats[held].update(scores, keys, rescale);
          pack_weights<T>(weights, scores);
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[held][n][i] *= rescale[i / 2];
          }
          multiply_weights_values<T, kDim>(out[held], weights, v.from(half), keys, lane);
        }
      }
      __syncthreads();  // nobody reads this block any more
    }
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
      const int row = (first + lane.warp + held * kWarps) * kStrip;
      if (row < work.rows) {
        stats[held].total();
        write_strip<T, kDim>(args, work, head, row, out[held], stats[held], q, lane);
      }
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
  if (work.keys <= kTileRows) {
    attend_resident<T, kDim, kBiased>(args, work, memory);
  } else {
    attend_streamed<T, kDim, kBiased>(args, work, memory);
  }
}

}  // namespace cuda
}  // namespace filbert
