// One head of some query rows, in one warp: which keys are chosen, and what comes of their values.
// See attn_binary.cuh.
#pragma once

#include "args/attn_binary.h"
#include "cuda/attn_binary_plan.h"
#include "cuda/device/bit_rows.cuh"
#include "cuda/device/spans.cuh"

namespace filbert {
namespace cuda {

constexpr int kBitKeys = static_cast<int>(kAttnBinaryKeys);
constexpr int kBitKeyTiles = kBitKeys / 8;  // mma to a block of keys

// A 32 x 32 matrix of bits, a row to a lane, transposed: squares of 16, 8, .. 1 bits change places
// across the diagonal. Each lane keeps half of its bits, and gets those of the other square.
__device__ __forceinline__ uint32_t transpose_bits_32x32(uint32_t x, int lane) {
  uint32_t lower = 0x0000ffffu;  // of each pair of squares
#pragma unroll
  for (int size = 16; size > 0; size /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, x, size);
    const bool second = lane & size;
    const uint32_t kept = second ? ~lower : lower;
    const int by = second ? 32 - size : size;
    const uint32_t turned = other << by | other >> (32 - by);
    x = (x & kept) | (turned & ~kept);
    lower ^= lower << size / 2;
  }
  return x;
}

// Where the row of values of key 8 n + c lies in shared memory: at 8 n + (c ^ 2 n % 8). Lanes that
// transpose read the keys 8 n + c of all n at once, and rows are an odd number of 16 bytes apart,
// so that without this all of them would lie in one bank.
__device__ __forceinline__ int value_place(int key) { return key ^ (key / 4 & 6); }

// The block's shared memory, in this order.
struct BitAttnMemory {
  int row_bytes;  // of a key or value
  uint32_t keys, values;
  uint32_t transposed;   // the warp's values: for each channel four words of keys
  const int64_t* table;  // [D + 1], if there is one
  int* sums;             // [rows of the tile]

  __device__ __forceinline__ BitAttnMemory(const AttnBinaryArgs& args, int warps, int warp,
                                           int tile_words) {
    const int words = warps * static_cast<int>(args.dim) / 32;
    row_bytes = ((words + 3) / 4 | 1) * 16;
    char* at = shared_memory();
    keys = shared_address(at);
    values = keys + kBitKeys * row_bytes;
    transposed = values + kBitKeys * row_bytes + warp * tile_words * 32 * 16;
    at += 2 * kBitKeys * row_bytes + warps * tile_words * 32 * 16;
    table = reinterpret_cast<const int64_t*>(at);
    if (args.table) at += (args.dim + 1) * 8;
    sums = reinterpret_cast<int*>(at);
  }
};

// One head of the tile's rows, in one warp. kWords: of a head, 2 or 4; heads of fewer leave some
// without a one in the queries.
template <int kWords>
struct BitHead {
  static constexpr int kStrips = kWords == 2 ? 2 : 1;  // 16 rows each

  const BitLane& lane;
  int words;        // that a head really has
  uint32_t invert;  // what a lane's word of a key is XORed with to be its word of [k | ~k]
  uint32_t key_at;  // the lane's word of the first key
  uint32_t value_at;
  int row_bytes;
  uint32_t queries[kStrips][4];

  __device__ __forceinline__ BitHead(const AttnBinaryArgs& args, const BitAttnMemory& memory,
                                     const BitLane& lane, int first_row, int rows, int head)
      : lane(lane), words(static_cast<int>(args.dim) / 32), row_bytes(memory.row_bytes) {
    const int word = kWords == 2 ? lane.place % 2 : lane.place;
    const bool there = word < words;
    invert = kWords == 2 && lane.place >= 2 ? ~0u : 0u;
    const int head_bytes = lane.warp * words * 4;
    key_at = memory.keys + head_bytes + (there ? word : 0) * 4 + lane.group * row_bytes;
    value_at = memory.values + head_bytes;
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = s * 16 + half * 8 + lane.group;
        const bool real = there && row < rows;
        const uint32_t q =
            real ? args.q[(first_row + row) * args.q_row + int64_t{head} * words + word] : 0;
        queries[s][half] = real ? q ^ invert : 0;
        queries[s][2 + half] = real ? ~q : 0;  // only of wide heads, which need a second half
      }
    }
  }

  // Matches of a strip's queries with keys 8 n .. 8 n + 7 of those in shared memory. What lies past
  // the last key there is anything.
  __device__ __forceinline__ uint32_t load_key(int n) const {
    return load_shared_4(key_at + n * 8 * row_bytes);
  }
  __device__ __forceinline__ void match(int32_t (&matches)[4], int strip, uint32_t key) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) matches[i] = 0;
    if (kWords == 2) {
      mma_b1_128(matches, queries[strip][0], queries[strip][1], key ^ invert);
    } else {
      mma_b1_256(matches, queries[strip], key, ~key);
    }
  }

  // Calls body(strip, n, matches) for all tiles of 8 keys of which there are any.
  template <typename Body>
  __device__ __forceinline__ void for_matches(int keys, Body body) const {
#pragma unroll
    for (int n = 0; n < kBitKeyTiles; ++n) {
      if (n * 8 < keys) {
        const uint32_t key = load_key(n);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          int32_t matches[4];
          match(matches, s, key);
          body(s, n, matches);
        }
      }
    }
  }

  // The bits at which a lane keeps keys that there are, of the first `keys`.
  __device__ __forceinline__ uint32_t real_keys(int keys) const {
    uint32_t real = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int count = clamped((keys - 2 * lane.place - i + 7) / 8, kBitKeyTiles);
      real |= static_cast<uint32_t>((uint64_t{1} << 2 * count) - 1) & (0x55555555u << i);
    }
    return real;
  }

  // A head's words of one row; in one piece where it fills the tile's, and is aligned therefore.
  __device__ __forceinline__ void load_words(uint32_t (&to)[kWords], uint32_t from) const {
    if (words == kWords && kWords == 2) {
      const uint2 two = load_shared_8(from);
      to[0] = two.x, to[1] = two.y;
    } else if (words == kWords) {
      const uint4 four = load_shared_16(from);
      to[0] = four.x, to[1] = four.y, to[kWords - 2] = four.z, to[kWords - 1] = four.w;
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) to[w] = w < words ? load_shared_4(from + w * 4) : 0;
    }
  }

  // Transposes the values in shared memory into `to`, keys in the lanes' order: lane c of a word's
  // 32 channels gets the four words of its channel.
  __device__ __forceinline__ void transpose_values(uint32_t to) const {
    const int id = static_cast<int>(thread_read_anew() % 32), key = id / 2 * 8 + id % 2;
    uint32_t values[4][kWords];  // of keys `key`, + 2, + 4, + 6
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      load_words(values[t], value_at + value_place(key + 2 * t) * row_bytes);
    }
    __syncwarp();  // nobody reads the last ones any more
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (w < words) {
        uint32_t four[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) four[t] = transpose_bits_32x32(values[t][w], id);
        store_shared_16(to + (w * 32 + id) * 16, {four[0], four[1], four[2], four[3]});
      }
    }
    __syncwarp();
  }
};

// Of a warp: common ones of chosen keys and values, and how many keys were chosen.
template <int kWords>
struct BitContext {
  static constexpr int kStrips = BitHead<kWords>::kStrips;
  int32_t common[kStrips][kWords * 4][4] = {};
  int chosen[kStrips][2] = {};

  // Adds a block of keys; a key is chosen with `least` matches or more.
  __device__ __forceinline__ void add(const BitHead<kWords>& head, int keys, uint32_t transposed,
                                      const int (&least)[kStrips][2]) {
    uint32_t weights[kStrips][2] = {};
    head.for_matches(keys, [&](int s, int n, const int32_t (&matches)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (matches[i] >= least[s][i / 2]) weights[s][i / 2] |= 1u << (2 * n + i % 2);
      }
    });
    const uint32_t real = head.real_keys(keys);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weights[s][half] &= real;
        chosen[s][half] += __popc(weights[s][half]);
      }
    }
    head.transpose_values(transposed);
#pragma unroll
    for (int n = 0; n < kWords * 4; ++n) {
      if (n < head.words * 4) {
        const uint32_t values =
            load_shared_4(transposed + (n * 8 + head.lane.group) * 16 + head.lane.place * 4);
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
          mma_b1_128(common[s][n], weights[s][0], weights[s][1], values);
      }
    }
  }

  // Compares with the thresholds and writes the rows' words of this head, in one plane or two.
  __device__ __forceinline__ void write(const AttnBinaryArgs& args, const BitLane& lane, int words,
                                        int head, int first_row, int rows, int* sums) {
    const int64_t row_words = args.heads * words, plane = args.rows * row_words;
    const bool exact = args.ties == Ties::kExact;
    int codes[kStrips][2] = {};
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) chosen[s][half] = sum_over_row(chosen[s][half]);
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (w >= words) continue;
      int threshold[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int channel = (head * words + w) * 32 + bit_of(i, lane);
        threshold[i] = args.threshold ? args.threshold[channel] : 0;
      }
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t above = 0, reached = 0;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int count = common[s][w * 4 + i / 2][half * 2 + i % 2];
            const int context = 2 * count - chosen[s][half];
            if (context > threshold[i]) above |= 1u << bit_of(i, lane);
            if (context >= threshold[i]) reached |= 1u << bit_of(i, lane);
          }
          above = or_over_row(above);
          reached = or_over_row(reached);
          const uint32_t low = exact                       ? reached & ~above
                               : args.ties == Ties::kBelow ? above
                                                           : reached;
          codes[s][half] += __popc(low) + (exact ? 2 * __popc(above) : 0);
          const int row = s * 16 + half * 8 + lane.group;
          if (row < rows && lane.place == w) {
            uint32_t* to = args.words + (first_row + row) * row_words + head * words + w;
            to[0] = low;
            if (exact) to[plane] = above;
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = s * 16 + half * 8 + lane.group;
        if (row < rows && lane.place == 0) atomicAdd(&sums[row], codes[s][half]);
      }
    }
  }

 private:
  // Where in a word the lane's value number i of 32 channels goes.
  static __device__ __forceinline__ int bit_of(int i, const BitLane& lane) {
    return i / 2 * 8 + lane.place * 2 + i % 2;
  }
};

}  // namespace cuda
}  // namespace filbert
