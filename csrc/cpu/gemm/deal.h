// How a product is dealt to the threads: blocks of rows, and shares of the outputs where there are
// few rows.
#pragma once

#include "cpu/threads/tasks.h"

namespace filbert {

constexpr int64_t kSharePanels = 4;        // panels of a share, at least: one row takes four
constexpr int64_t kShareWork = 64 * 1024;  // multiply-adds worth waking a thread for
constexpr int64_t kRowsApart = 48;         // a thread with fewer rows had better share them

// A product of `rows` rows with `panels` panels.
struct ProductDeal {
  int64_t rows, panels, tile_rows;
  int64_t blocks;      // of whole tiles: a tile with a row less takes no less time
  int64_t shares;      // of the outputs, for each block
  int64_t hands;       // threads
  int64_t block_rows;  // of a block, at most

  // `most` are the rows of a block, at most; `work` counts multiply-adds; a thread gets rows of its
  // own from `rows_apart` for each on.
  ProductDeal(int64_t rows, int64_t panels, int64_t work, int64_t most, int64_t tile_rows,
              int64_t rows_apart = kRowsApart)
      : rows(rows), panels(panels), tile_rows(tile_rows) {
    const int64_t threads = thread_count();
    work = std::max<int64_t>(work, 1);
    // Rows first: a block of them reads the weight once. Threads that this leaves without work
    // share the outputs of a block.
    const int64_t apart = std::clamp<int64_t>(rows / rows_apart, 1, threads);
    // As many to each thread: with three blocks two threads would take the time of four.
    blocks = ((rows + most - 1) / most + apart - 1) / apart * apart;
    const int64_t wanted = std::min((threads + blocks - 1) / blocks, work / kShareWork / blocks);
    shares = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, panels / kSharePanels));
    block_rows = (tiles() + blocks - 1) / blocks * tile_rows;
    hands = work < 2 * kShareWork ? 1 : threads;
  }

  int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows; }

  // Runs body(row_begin, row_end, panel_begin, panel_end, scratch) for every task.
  template <typename Body>
  void run(int64_t scratch_bytes, const Body& body) const {
    for_tasks(blocks * shares, hands, scratch_bytes, [&](int64_t task, void* scratch) {
      const int64_t block = task / shares, share = task % shares;
      body(block * tiles() / blocks * tile_rows,
           std::min((block + 1) * tiles() / blocks * tile_rows, rows), panels * share / shares,
           panels * (share + 1) / shares, scratch);
    });
  }
};

}  // namespace filbert
