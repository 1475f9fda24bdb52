// What one block of attention works on: which rows of which sequence, and how many heads of it.
#pragma once

#include <cstdint>

#include "args/attn_tiles.h"
#include "args/attn_varlen.h"
#include "cuda/device/arithmetic.cuh"

namespace filbert {
namespace cuda {

// Heads that one block takes: as many as give each of its four warps 16 query rows, if their keys
// fit side by side where otherwise those of one head lie.
__device__ __forceinline__ int heads_per_block(int rows, int keys) {
  if (rows <= 16 && keys <= 32) return 4;
  if (rows <= 32 && keys <= 64) return 2;
  return 1;
}

struct AttnWork {
  int q_row;  // first query row, among all packed rows
  int rows;   // query rows, at most kAttnTileRows
  int k_row;  // first key row that any of them sees, among all packed rows
  int keys;   // and how many follow
  int place;  // the key that query row q_row stands at, counted from k_row; may be negative
  int head;   // first head
  int heads;  // how many, at most slots
  int slots;  // heads that share the block's memory: 1, 2 or 4
};

// Work of one block, by its number on the list.
struct AttnList {
  int tiles[3];  // with one, two and four heads to a block
  int groups[3];

  __device__ __forceinline__ explicit AttnList(const AttnVarlenArgs& args) {
    int left = static_cast<int>(args.capacity);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      tiles[c] = larger(0, smaller(args.tiles[c], left));
      left -= tiles[c];
      groups[c] = (static_cast<int>(args.heads) + (1 << c) - 1) >> c;
    }
  }

  __device__ __forceinline__ int count() const {
    return tiles[0] * groups[0] + tiles[1] * groups[1] + tiles[2] * groups[2];
  }

  // Numbers from the list are clamped into the tensors: it is an operand like any other, and a
  // wrong one must not reach memory that is not the call's.
  __device__ __forceinline__ AttnWork at(const AttnVarlenArgs& args, int index) const {
    int c = 0, group = groups[0], first_tile = 0;
#pragma unroll
    for (int next = 1; next < 3; ++next) {
      const int before = tiles[next - 1] * groups[next - 1];
      if (c == next - 1 && index >= before) {
        index -= before;
        first_tile += tiles[next - 1];
        group = groups[next];
        c = next;
      }
    }
    const int32_t* tile = args.tiles + kTileHeader + kTileFields * (first_tile + index / group);
    const int rows_q = static_cast<int>(args.rows_q), rows_k = static_cast<int>(args.rows_k);
    const int most = static_cast<int>(kAttnTileRows) >> c;  // rows and keys of one slot
    AttnWork work{};
    work.slots = 1 << c;
    work.head = (index % group) << c;
    work.heads = smaller(work.slots, static_cast<int>(args.heads) - work.head);
    work.q_row = clamped(tile[kTileQRow], rows_q);
    work.rows = clamped(tile[kTileQRows], smaller(most, rows_q - work.q_row));
    const int k_row = clamped(tile[kTileKRow], rows_k);
    const int keys = clamped(tile[kTileKeys], rows_k - k_row);
    const int place = tile[kTilePlace];
    int from = 0, to = keys;
    if (args.window_left >= 0 && args.window_left < keys) {
      from = clamped(place - static_cast<int>(args.window_left), keys);
    }
    if (args.window_right >= 0 && args.window_right < keys) {
      to = clamped(place + work.rows + static_cast<int>(args.window_right), keys);
    }
    work.k_row = k_row + from;
    work.keys = larger(0, to - from);
    if (c > 0) work.keys = smaller(work.keys, most);
    work.place = place - from;
    return work;
  }
};

// What is added to scores, and which are hidden. Left out altogether where a call has none of it.
struct ScoreBias {
  const float* key_bias;  // of the first key, or null
  float slope;
  bool alibi;
  int left, right;  // how far a query sees; more than any distance where there is no bound

  static __host__ __device__ __forceinline__ bool any(const AttnVarlenArgs& args) {
    return args.alibi_slopes || args.key_bias || args.window_left >= 0 || args.window_right >= 0;
  }

  __device__ __forceinline__ ScoreBias(const AttnVarlenArgs& args, const AttnWork& work, int head) {
    constexpr int kUnbounded = 0x7fffffff;
    key_bias = args.key_bias ? args.key_bias + work.k_row : nullptr;
    alibi = args.alibi_slopes != nullptr;
    slope = alibi ? args.alibi_slopes[head] : 0.0f;
    left = args.window_left >= 0 && args.window_left < kUnbounded
               ? static_cast<int>(args.window_left)
               : kUnbounded;
    right = args.window_right >= 0 && args.window_right < kUnbounded
                ? static_cast<int>(args.window_right)
                : kUnbounded;
  }

  // `score` of the query that stands at key `place`, for key number `key`.
  __device__ __forceinline__ float apply(float score, int place, int key) const {
    const int distance = key - place;
    if (alibi) score -= multiply_rn(slope, fabsf(static_cast<float>(distance)));
    if (key_bias) score += key_bias[key];
    return -distance > left || distance > right ? -INFINITY : score;
  }
};

}  // namespace cuda
}  // namespace filbert
