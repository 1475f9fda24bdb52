#pragma once

#include "args/common.h"

namespace filbert {

// The work list of attn_varlen on a GPU: every sequence cut into tiles of at most kAttnTileRows
// query rows, largest first. It does not depend on heads, head dimension or dtype, so one list
// serves every layer of a forward.
//
// A header of kTileHeader values: the numbers of tiles whose block takes one, two and four heads,
// and a 0. Then, in that order, the tiles, kTileFields values each. Rows that no sequence owns are
// listed as sequence B, which has no keys.
constexpr int64_t kAttnTileRows = 128;
constexpr int64_t kTileHeader = 4;
constexpr int64_t kTileFields = 8;
enum TileField : int {
  kTileQRow,   // first query row, among all packed rows
  kTileQRows,  // how many
  kTileKRow,   // first key row of the sequence, among all packed rows
  kTileKeys,   // how many
  kTilePlace,  // the key that query row kTileQRow stands at, from the sequence's first; may be < 0
  kTileSequence,  // whose rows these are, for people
};

// An upper bound that needs no look at the lengths.
constexpr int64_t tile_capacity(int64_t rows_q, int64_t sequences) {
  return rows_q / kAttnTileRows + sequences + 1;
}

constexpr int64_t tile_values(int64_t capacity) { return kTileHeader + kTileFields * capacity; }

struct AttnTilesArgs {
  const int32_t* cu_q;  // [B + 1]
  const int32_t* cu_k;  // [B + 1]
  int32_t* tiles;       // [tile_values(capacity)]
  int64_t rows_q;       // Tq
  int64_t rows_k;       // Tk
  int64_t sequences;    // B
  int64_t capacity;     // tile_capacity(rows_q, sequences)
};

void attn_tiles_cuda(const AttnTilesArgs& args, void* stream);

}  // namespace filbert
