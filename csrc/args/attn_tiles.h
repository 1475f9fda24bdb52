#pragma once

#include "args/common.h"

namespace filbert {

// The work list of attn_varlen on a GPU: every sequence cut into tiles of at most kTileRows query
// rows, largest first. It does not depend on heads, head dimension or dtype, so one list serves
// every layer of a forward.
//
// tiles[0..2] are the numbers of tiles whose block takes one, two and four heads; tiles[3] is 0.
// Then, in that order, the tiles: (sequence, first query row within it). Sequence B stands for the
// query rows past the last sequence, which have no keys and become zeros.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTileHeader = 4;  // int32 values before the first tile

// An upper bound that needs no look at the lengths.
constexpr int64_t tile_capacity(int64_t rows_q, int64_t sequences) {
  return rows_q / kTileRows + sequences + 1;
}

struct AttnTilesArgs {
  const int32_t* cu_q;  // [B + 1]
  const int32_t* cu_k;  // [B + 1]
  int32_t* tiles;       // [kTileHeader + 2 * capacity]
  int64_t rows_q;       // Tq
  int64_t rows_k;       // Tk
  int64_t sequences;    // B
  int64_t capacity;     // tile_capacity(rows_q, sequences)
};

}  // namespace filbert
