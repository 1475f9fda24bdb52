// The two products of attention on strips of 16 query rows, and what comes between and after them.
#pragma once

#include "cuda/attention/rows.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/attention/work.cuh"
#include "cuda/attn_varlen_plan.h"

namespace filbert {
namespace cuda {

constexpr int kWarps = static_cast<int>(kAttnThreads) / 32;
constexpr int kStep = 16;  // keys of one mma

// scores[s][n] = Q K^T of keys 8 n .. 8 n + 7 and the strips at rows `row`, `row` + `apart`, ...,
// for all tiles. Every key fragment is loaded once for all strips.
template <typename T, int kDim, int kStrips, int kTiles>
__device__ __forceinline__ void multiply_queries_keys(float (&scores)[kStrips][kTiles][4],
                                                      SharedRows<kDim> q, int row, int apart,
                                                      SharedRows<kDim> k, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < kStrips * kTiles * 4; ++i) scores[i / 4 / kTiles][i / 4 % kTiles][i % 4] = 0;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) load_queries(a[s], q, row + s * apart, step, lane);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_keys(b, k, n * 8, step, lane);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        mma_16816<T>(scores[s][n], a[s], b[0], b[1]);
        mma_16816<T>(scores[s][n + 1], a[s], b[2], b[3]);
      }
    }
  }
}

// The same for one strip and the pairs of tiles that begin before `keys` keys. The queries stay in
// registers, so that a pair is passed over by one branch.
template <typename T, int kDim, int kTiles>
__device__ __forceinline__ void multiply_queries_some_keys(float (&scores)[kTiles][4],
                                                           SharedRows<kDim> q, int row,
                                                           SharedRows<kDim> k, int keys,
                                                           const Lane& lane) {
  uint32_t a[kDim / 16][4];
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) load_queries(a[step], q, row, step, lane);
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    if (n * 8 < keys) {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[n + i / 4][i % 4] = 0.0f;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        uint32_t b[4];
        load_keys(b, k, n * 8, step, lane);
        mma_16816<T>(scores[n], a[step], b[0], b[1]);
        mma_16816<T>(scores[n + 1], a[step], b[2], b[3]);
      }
    }
  }
}

// Scales scores and adds their biases. Tile 0 begins with key `first_key`.
template <int kTiles>
__device__ __forceinline__ void add_biases(float (&scores)[kTiles][4], const AttnVarlenArgs& args,
                                           const AttnWork& work, int head, int row, int first_key,
                                           const Lane& lane) {
  const int keys = work.keys - first_key;
  const ScoreBias bias(args, work, head);
  const int place = work.place + row + lane.group;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = n * 8 + lane.column + i % 2;
      if (key < keys) {
        scores[n][i] =
            bias.apply(multiply_rn(scores[n][i], args.scale), place + i / 2 * 8, first_key + key);
      }
    }
  }
}

// Hides the scores of what is past the last of `keys` keys, from tile kFrom on: whatever was
// multiplied there.
template <int kFrom, int kTo, int kTiles>
__device__ __forceinline__ void hide_past(float (&scores)[kTiles][4], int keys, const Lane& lane) {
  const int there = keys - lane.column;
#pragma unroll
  for (int n = kFrom; n < kTo; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + i % 2 >= there) scores[n][i] = -INFINITY;
    }
  }
}

// The same for the pair of tiles with the last key in it.
template <int kFrom = 0, int kTiles>
__device__ __forceinline__ void hide_in_last_step(float (&scores)[kTiles][4], int keys,
                                                  const Lane& lane) {
  if constexpr (kFrom < kTiles) {
    if (kFrom * 8 < keys && keys < kFrom * 8 + kStep) {
      hide_past<kFrom, kFrom + 2>(scores, keys, lane);
    }
    hide_in_last_step<kFrom + 2>(scores, keys, lane);
  }
}

// out[kFrom + s] += P[s] V over the first `keys` keys, in whole steps of 16. Every value fragment
// is loaded once for all strips. Two tiles of C, rounded to 16 bits, are one of operand A.
template <typename T, int kDim, int kFrom = 0, int kHeld, int kStrips, int kTiles>
__device__ __forceinline__ void multiply_weights_values(float (&out)[kHeld][kDim / 8][4],
                                                        const float (&weights)[kStrips][kTiles][4],
                                                        SharedRows<kDim> v, int keys,
                                                        const Lane& lane) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    if (n * 8 < keys) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&tile)[4] = weights[s][n + i / 2];
          a[s][i] = pack2<T>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int column = 0; column < kDim / 16; ++column) {
        uint32_t b[4];
        load_values(b, v, n * 8, column, lane);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          mma_16816<T>(out[kFrom + s][2 * column], a[s], b[0], b[1]);
          mma_16816<T>(out[kFrom + s][2 * column + 1], a[s], b[2], b[3]);
        }
      }
    }
  }
}

// Divides by the sums and writes the strip's rows of `out` and `lse`. `staging` is the strip's own
// rows of Q, which nobody needs any more: fragments go there so that rows leave in whole pieces.
template <typename T, int kDim>
__device__ __forceinline__ void write_strip(const AttnVarlenArgs& args, const AttnWork& work,
                                            int head, int row, const float (&out)[kDim / 8][4],
                                            const RowStats& stats, const ScoreScale& scale,
                                            SharedRows<kDim> staging, const Lane& lane) {
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
  constexpr int kPieces = SharedRows<kDim>::kPieces, kRows = 32 / kPieces;  // a warp's at a time
  const int piece = lane.id % kPieces, first = row + lane.id / kPieces;
  const bool inside = piece * 8 < args.dim;
  T* to = static_cast<T*>(args.out) + (work.q_row + first) * args.out_row + head * args.out_head +
          piece * 8;
#pragma unroll
  for (int i = 0; i < kStrip; i += kRows) {
    if (inside && first + i < work.rows) {
      store_16(to, load_shared_16(staging.at(first + i, piece)));
    }
    to += kRows * args.out_row;
  }
  // Two of the four lanes that share two rows take one each.
  const bool second = lane.column != 0;
  const int r = row + lane.group + 8 * second;
  if (lane.column <= 2 && r < work.rows) {
    args.lse[head * args.rows_q + work.q_row + r] = stats.log_sum_exp(second, scale);
  }
}

}  // namespace cuda
}  // namespace filbert
