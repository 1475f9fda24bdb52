// Deals a dense product out over the threads: blocks of rows, and shares of the outputs where there
// are few rows.
#include "cpu/linear_dense_kernel.h"

#include "cpu/norm_residual_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {
namespace {

constexpr int64_t kSharePanels = 4;        // panels of a share, at least: one row takes four
constexpr int64_t kShareWork = 64 * 1024;  // multiply-adds worth waking a thread for
constexpr int64_t kRowsApart = 48;         // a thread with fewer rows had better share them

}  // namespace

FILBERT_CHOOSE(LinearDenseKernel, linear_dense, FILBERT_COPIES(linear_dense))

void linear_dense_cpu(const LinearDenseArgs& args) {
  const LinearDenseKernel& kernel = chosen_linear_dense();
  const int64_t threads = thread_count();
  const int64_t panels = (args.outputs + kDensePanel - 1) / kDensePanel;
  const int64_t work = std::max<int64_t>(1, args.rows * args.outputs * args.inputs);
  // Rows first: a block of them reads the weight once. Threads that this leaves without work share
  // the outputs of a block.
  const int64_t most = kernel.rows(args);
  const int64_t apart = std::clamp<int64_t>(args.rows / kRowsApart, 1, threads);
  // As many to each thread: with three blocks two threads would take the time of four.
  const int64_t blocks = ((args.rows + most - 1) / most + apart - 1) / apart * apart;
  const int64_t wanted = std::min((threads + blocks - 1) / blocks, work / kShareWork / blocks);
  const int64_t shares =
      std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, panels / kSharePanels));
  const int64_t tasks = blocks * shares;
  // Whole tiles: a tile with a row less takes no less time.
  const int64_t tiles = (args.rows + kernel.tile_rows - 1) / kernel.tile_rows;
  const int64_t rows = (tiles + blocks - 1) / blocks * kernel.tile_rows;
  const NormResidualArgs norm = norm_of_output(args);
  const NormResidualKernel& layer_norm = chosen_norm_residual();
  // LayerNorm follows a block while it is in the cache, in memory that the product is done with.
  const int64_t norm_bytes = args.norm_weight ? layer_norm.scratch(norm) : 0;
  const int64_t bytes = std::max(kernel.scratch(args, rows), norm_bytes);
  const int64_t hands = work < 2 * kShareWork ? 1 : threads;
  for_tasks(tasks, hands, bytes, [&](int64_t task, void* scratch) {
    const int64_t block = task / shares, share = task % shares;
    const int64_t begin = block * tiles / blocks * kernel.tile_rows;
    const int64_t end = std::min((block + 1) * tiles / blocks * kernel.tile_rows, args.rows);
    kernel.block(args, begin, end, panels * share / shares, panels * (share + 1) / shares, scratch);
    if (args.norm_weight && shares == 1) layer_norm.rows(norm, begin, end, scratch);
  });
  if (args.norm_weight && shares > 1) norm_residual_cpu(norm);  // a row is whole only now
}

}  // namespace filbert
