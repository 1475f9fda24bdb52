// What one block of attention works on: which rows of which sequence, and how many heads of it.
#pragma once

#include <cstdint>

#include "args/attn_tiles.h"
#include "args/attn_varlen.h"
#include "cuda/ptx.cuh"

namespace filbert {
namespace cuda {

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

// Rows of one sequence. Offsets are clamped into the tensor, because nobody has read them on the
// host: wrong ones may give wrong results, and never touch memory that is not the call's.
struct Span {
  int begin;
  int length;
};

__device__ __forceinline__ Span span_of(const int32_t* cu, int64_t sequence, int64_t rows) {
  const int most = static_cast<int>(rows);
  const int begin = larger(0, smaller(cu[sequence], most));
  return {begin, larger(0, smaller(cu[sequence + 1], most) - begin)};
}

// The query rows that no sequence owns, as one more sequence.
__device__ __forceinline__ Span rows_past_end(const int32_t* cu, int64_t sequences, int64_t rows) {
  const int most = static_cast<int>(rows);
  const int begin = larger(0, smaller(cu[sequences], most));
  return {begin, most - begin};
}

// Heads that one block takes: as many as give each of its four warps 16 query rows, if their keys
// fit side by side where otherwise those of one head lie.
__device__ __forceinline__ int heads_per_block(int rows, int keys) {
  if (rows <= 16 && keys <= 32) return 4;
  if (rows <= 32 && keys <= 64) return 2;
  return 1;
}

struct AttnWork {
  int q_row;  // first query row, among all packed rows
  int rows;   // query rows, at most kTileRows; 0: nothing to do
  int k_row;  // first key row that any of them sees, among all packed rows
  int keys;   // and how many follow
  int place;  // query row q_row stands at this key: keys counted from k_row, may be negative
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
    const int32_t* tile = args.tiles + kTileHeader + 2 * (first_tile + index / group);
    const int sequence = tile[0], first = tile[1];
    AttnWork work{};
    work.slots = 1 << c;
    work.head = (index % group) << c;
    work.heads = smaller(work.slots, static_cast<int>(args.heads) - work.head);
    const bool owned = sequence >= 0 && sequence < args.sequences;
    const Span q = owned ? span_of(args.cu_q, sequence, args.rows_q)
                         : rows_past_end(args.cu_q, args.sequences, args.rows_q);
    const Span k = owned ? span_of(args.cu_k, sequence, args.rows_k) : Span{0, 0};
    work.q_row = q.begin + first;
    work.rows = larger(0, smaller(q.length - first, static_cast<int>(kTileRows) >> c));
    // Both ends are aligned: the last query looks straight at the last key.
    const int place = first + k.length - q.length;
    int from = 0, to = k.length;
    if (args.window_left >= 0 && args.window_left < k.length) {
      from = larger(from, place - static_cast<int>(args.window_left));
    }
    if (args.window_right >= 0 && args.window_right < k.length) {
      to = smaller(to, place + work.rows + static_cast<int>(args.window_right));
    }
    work.k_row = k.begin + from;
    work.keys = larger(0, to - from);
    if (c > 0) work.keys = smaller(work.keys, static_cast<int>(kTileRows) >> c);
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
