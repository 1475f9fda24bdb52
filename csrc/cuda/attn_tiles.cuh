// The work list of attn_varlen: a counting sort of tiles by their cost, largest first, in one
// block. Made once per forward, on the device, so that nobody has to know the lengths on the host.
#pragma once

#include "cuda/attention/work.cuh"
#include "cuda/attn_tiles_plan.h"
#include "cuda/device/spans.cuh"

namespace filbert {
namespace cuda {

// The bin of a tile. Tiles of one head to a block come first, by falling cost, two bins to an
// octave; then those of two heads, then of four, which cost about the same among themselves.
__device__ __forceinline__ int tile_bin(int rows, int keys) {
  const int heads = heads_per_block(rows, keys);
  if (heads > 1) return heads == 2 ? kTileBins - 2 : kTileBins - 1;
  const int cost = (rows + 15) / 16 * larger(1, (keys + 15) / 16);
  const int octave = 31 - __clz(cost);
  const int half = octave == 0 ? 0 : cost >> (octave - 1) & 1;
  return kTileBins - 3 - (2 * octave + half);
}

// Calls body(bin, first row, rows, query span, key span) for every tile of one sequence.
template <typename Body>
__device__ __forceinline__ void for_tiles(const AttnTilesArgs& args, int sequence, Body body) {
  const int sequences = static_cast<int>(args.sequences);
  const bool owned = sequence < sequences;
  const Span q = owned ? span_of(args.cu_q, sequence, args.rows_q)
                       : rows_past_end(args.cu_q, sequences, args.rows_q);
  const Span k = owned ? span_of(args.cu_k, sequence, args.rows_k) : Span{0, 0};
  for (int first = 0; first < q.length; first += static_cast<int>(kAttnTileRows)) {
    const int rows = smaller(q.length - first, static_cast<int>(kAttnTileRows));
    body(tile_bin(rows, k.length), first, rows, q, k);
  }
}

static __global__ void attn_tiles_kernel(const __grid_constant__ AttnTilesArgs args) {
  int* count = reinterpret_cast<int*>(shared_memory());  // [kTileBins]
  int* next = count + kTileBins;                         // [kTileBins] where a bin's next tile goes
  const int thread = threadIdx.x, threads = blockDim.x;
  const int sequences = static_cast<int>(args.sequences);

  for (int bin = thread; bin < kTileBins; bin += threads) count[bin] = 0;
  __syncthreads();
  for (int s = thread; s <= sequences; s += threads) {
    for_tiles(args, s, [&](int bin, int, int, Span, Span) { atomicAdd(&count[bin], 1); });
  }
  __syncthreads();
  for (int bin = thread; bin < kTileBins; bin += threads) {
    int before = 0;
    for (int b = 0; b < bin; ++b) before += count[b];
    next[bin] = before;
  }
  __syncthreads();
  if (thread == 0) {
    args.tiles[0] = next[kTileBins - 2];
    args.tiles[1] = count[kTileBins - 2];
    args.tiles[2] = count[kTileBins - 1];
    args.tiles[3] = 0;
  }
  __syncthreads();  // the counts are read before places are taken
  for (int s = thread; s <= sequences; s += threads) {
    for_tiles(args, s, [&](int bin, int first, int rows, Span q, Span k) {
      const int place = atomicAdd(&next[bin], 1);
      if (place >= args.capacity) return;  // offsets that fall list some rows twice
      int32_t* tile = args.tiles + kTileHeader + kTileFields * place;
      tile[kTileQRow] = q.begin + first;
      tile[kTileQRows] = rows;
      tile[kTileKRow] = k.begin;
      tile[kTileKeys] = k.length;
      // Both ends are aligned: the last query looks straight at the last key.
      tile[kTilePlace] = first + k.length - q.length;
      tile[kTileSequence] = s;
    });
  }
}

}  // namespace cuda
}  // namespace filbert
