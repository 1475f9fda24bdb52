// Attention whose queries, keys, values and weights are bits, on tensor cores.
//
// A block takes up to 32 query rows of one sequence (16 with wide heads) and all heads of them, a
// warp a head; with more heads than warps it takes turns. Keys and values come through shared
// memory 128 at a time, whole rows of the turn's heads.
//
//   Scores. Bits q and k differ or match; S = 2 matches - D. Matches are the common ones of [q |
//   ~q] and [k | ~k]: one mma of 128 bits for 8 keys and heads of up to 64, of 256 bits for wider
//   ones. Whether a key is chosen is one comparison of its matches with an integer.
//
//   Boolean attention: that integer is the same for all rows, and one pass over the keys does it.
//   With a table: a first pass finds each row's best matches, a second sums the table's weights
//   over the keys, in 64-bit integers and therefore exactly, and the third is that of Boolean
//   attention.
//
//   Context. Lane t of a fragment row holds the scores of keys 8 n + 2 t and the next, n = 0..15.
//   It puts what is chosen of them at bits 2 n and 2 n + 1 of a word, which so is a word of operand
//   A, for an order of keys in which word t begins with keys 2 t, 2 t + 1, 8 + 2 t, ... The values
//   are transposed in just that order, and no bit has to move between lanes. With P the common ones
//   of chosen keys and a channel's values, the context is 2 P - chosen keys.
#pragma once

#include "cuda/attn_binary/head.cuh"

namespace filbert {
namespace cuda {

// Some words of some neighbouring rows.
struct BitSpan {
  const uint32_t* base;
  int64_t stride;

  // Starts copying `rows` of them, `words` words each, to the places that `place` gives them. The
  // block's threads take four words at a time.
  template <typename Place>
  __device__ __forceinline__ void fetch(uint32_t to, int row_bytes, int rows, int words,
                                        Place place) const {
    const int pieces = (words + 3) / 4;
    const bool whole = reinterpret_cast<uintptr_t>(base) % 16 == 0 && (stride | words) % 4 == 0;
    for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
      const int row = i / pieces, piece = i % pieces;
      const uint32_t target = to + place(row) * row_bytes + piece * 16;
      const uint32_t* from = base + row * stride + piece * 4;
      if (whole) {
        fetch_piece(target, from, words - piece * 4, base);
      } else {
        fetch_words(target, from, words - piece * 4, base);
      }
    }
  }
};

// The rows of one sequence that a block takes.
struct BitTile {
  int first_row, rows;  // among all packed rows
  Span keys;
};

template <int kWords, bool kTable>
__device__ __forceinline__ void attend(const AttnBinaryArgs& args, const BitTile& tile,
                                       const BitAttnMemory& memory, const BitLane& lane) {
  constexpr int kStrips = BitHead<kWords>::kStrips;
  const int warps = blockDim.x / 32, heads = static_cast<int>(args.heads);
  const int words = static_cast<int>(args.dim) / 32;
  if (threadIdx.x < kStrips * 16) memory.sums[threadIdx.x] = 0;

  for (int turn = 0; turn < heads; turn += warps) {
    const int head = turn + lane.warp;
    const bool active = head < heads;
    const int turn_words = smaller(warps, heads - turn) * words;
    const int64_t turn_word = int64_t{turn} * words;
    const BitSpan k{args.k + tile.keys.begin * args.k_row + turn_word, args.k_row};
    const BitSpan v{args.v + tile.keys.begin * args.v_row + turn_word, args.v_row};
    const BitHead<kWords> bits(args, memory, lane, tile.first_row, active ? tile.rows : 0, head);

    // Calls body(keys) for each block of keys when it is in shared memory, for warps with a head.
    const auto for_key_blocks = [&](bool with_values, auto body) {
      for (int first = 0; first < tile.keys.length; first += kBitKeys) {
        const int keys = smaller(kBitKeys, tile.keys.length - first);
        __syncthreads();  // nobody reads the last ones any more
        const BitSpan some{k.base + first * k.stride, k.stride};
        some.fetch(memory.keys, memory.row_bytes, keys, turn_words, [](int row) { return row; });
        if (with_values) {
          const BitSpan values{v.base + first * v.stride, v.stride};
          values.fetch(memory.values, memory.row_bytes, keys, turn_words, value_place);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        if (active) body(keys);
      }
    };

    int least[kStrips][2];  // matches of a key that is chosen
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        least[s][half] = static_cast<int>(args.dim) / 2 + (args.choose_zeros ? 0 : 1);
      }
    }
    if (kTable) {
      int best[kStrips][2] = {};
      for_key_blocks(false, [&](int keys) {
        const uint32_t real = bits.real_keys(keys);
        bits.for_matches(keys, [&](int s, int n, const int32_t (&matches)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (real >> (2 * n + i % 2) & 1) best[s][i / 2] = larger(best[s][i / 2], matches[i]);
          }
        });
      });
      int64_t total[kStrips][2] = {};
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) best[s][half] = max_over_row(best[s][half]);
      }
      for_key_blocks(false, [&](int keys) {
        const uint32_t real = bits.real_keys(keys);
        bits.for_matches(keys, [&](int s, int n, const int32_t (&matches)[4]) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (real >> (2 * n + i % 2) & 1) {
              total[s][i / 2] += memory.table[best[s][i / 2] - matches[i]];
            }
          }
        });
      });
      // The table never rises: how many of its first entries are chosen is found by halving.
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t limit =
              floor_to_int64(args.half * static_cast<double>(sum_over_row(total[s][half])));
          int chosen = 0;
          for (int step = static_cast<int>(kMaxBinaryDim); step > 0; step /= 2) {
            const bool more =
                chosen + step <= args.dim + 1 && memory.table[chosen + step - 1] > limit;
            chosen += more ? step : 0;
          }
          least[s][half] = best[s][half] + 1 - chosen;
        }
      }
    }
    BitContext<kWords> context;
    for_key_blocks(true, [&](int keys) { context.add(bits, keys, memory.transposed, least); });
    if (active) context.write(args, lane, words, head, tile.first_row, tile.rows, memory.sums);
  }
  __syncthreads();  // all heads have been summed
  if (threadIdx.x < static_cast<unsigned>(tile.rows)) {
    args.sums[tile.first_row + threadIdx.x] = memory.sums[threadIdx.x];
  }
  __syncthreads();
}

// Zeros for rows that no sequence owns; `part` of `parts` blocks.
__device__ __forceinline__ void clear_rows(const AttnBinaryArgs& args, const Span& rows, int part,
                                           int parts) {
  const int64_t row_words = args.heads * args.dim / 32, plane = args.rows * row_words;
  const int64_t first = int64_t{part} * blockDim.x + threadIdx.x,
                step = int64_t{parts} * blockDim.x;
  uint32_t* words = args.words + rows.begin * row_words;
  for (int64_t i = first; i < rows.length * row_words; i += step) {
    words[i] = 0;
    if (args.ties == Ties::kExact) words[plane + i] = 0;
  }
  for (int64_t i = first; i < rows.length; i += step) args.sums[rows.begin + i] = 0;
}

// As many blocks to a sequence as the longest is said to need, and as many to the rows after the
// last one. Each strides over what there really is.
template <int kWords, bool kTable>
__global__ void __launch_bounds__(32 * kAttnBinaryWarps, 2)
    attn_binary_kernel(const __grid_constant__ AttnBinaryArgs args) {
  constexpr int kPartRows = BitHead<kWords>::kStrips * 16;
  const int sequences = static_cast<int>(args.sequences);
  const int parts = static_cast<int>(gridDim.x) / (sequences + 1);
  const int sequence = static_cast<int>(blockIdx.x) / parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  if (sequence >= sequences) {
    return clear_rows(args, rows_past_end(args.cu, sequences, args.rows), part, parts);
  }
  const BitLane lane;
  const BitAttnMemory memory(args, blockDim.x / 32, lane.warp, kWords);
  if (kTable) {
    int64_t* table = const_cast<int64_t*>(memory.table);
    for (int j = threadIdx.x; j <= args.dim; j += blockDim.x) table[j] = args.table[j];
  }
  const Span span = span_of(args.cu, sequence, args.rows);
  for (int first = part * kPartRows; first < span.length; first += parts * kPartRows) {
    const BitTile tile{span.begin + first, smaller(kPartRows, span.length - first), span};
    attend<kWords, kTable>(args, tile, memory, lane);
  }
}

}  // namespace cuda
}  // namespace filbert
