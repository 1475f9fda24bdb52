// Deals a dense product out over the threads: blocks of rows, and shares of the outputs where there
// are few rows.
#include "args/linear_dense.h"

#include <algorithm>
#include <atomic>

#include "args/norm_residual.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/threads/parallel.h"
#include "cpu/threads/scratch.h"

namespace filbert {
namespace {

thread_local Scratch scratch;

constexpr int64_t kSharePanels = 4;        // panels of a share, at least: one row takes four
constexpr int64_t kShareWork = 64 * 1024;  // multiply-adds worth waking a thread for
constexpr int64_t kRowsApart = 48;         // a thread with fewer rows had better share them

NormResidualArgs norm_of(const LinearDenseArgs& args) {
  NormResidualArgs norm{};
  norm.dtype = args.dtype;
  norm.x = norm.out = args.out;
  norm.x_row = norm.out_row = norm.width = args.outputs;
  norm.residual = args.residual;
  norm.residual_row = args.residual_row;
  norm.weight = args.norm_weight;
  norm.beta = args.norm_bias;
  norm.rows = args.rows;
  norm.eps = args.eps;
  return norm;
}

// LayerNorm of finished rows [begin, end), in place.
void normalise(const CpuKernels& kernels, const NormResidualArgs& norm, int64_t begin,
               int64_t end) {
  const int64_t floats = 4 * (norm.width + kernels.vector_bytes / 4);
  kernels.norm_residual_rows(norm, begin, end,
                             static_cast<float*>(scratch.at_least(floats * sizeof(float))));
}

}  // namespace

void linear_dense_cpu(const LinearDenseArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = thread_count();
  const int64_t panels = (args.outputs + kDensePanel - 1) / kDensePanel;
  const int64_t work = std::max<int64_t>(1, args.rows * args.outputs * args.inputs);
  // Rows first: a block of them reads the weight once. Threads that this leaves without work share
  // the outputs of a block.
  const int64_t most = kernels.linear_dense_rows(args);
  const int64_t apart = std::clamp<int64_t>(args.rows / kRowsApart, 1, threads);
  // As many to each thread: with three blocks two threads would take the time of four.
  const int64_t blocks = ((args.rows + most - 1) / most + apart - 1) / apart * apart;
  const int64_t wanted = std::min((threads + blocks - 1) / blocks, work / kShareWork / blocks);
  const int64_t shares =
      std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, panels / kSharePanels));
  const int64_t tasks = blocks * shares;
  const int64_t rows = (args.rows + blocks - 1) / blocks;
  const int64_t bytes = kernels.linear_dense_scratch(args, rows);
  const NormResidualArgs norm = norm_of(args);
  std::atomic<int64_t> next{0};
  const int64_t hands = work < 2 * kShareWork ? 1 : std::min(threads, tasks);
  parallel_for(hands, 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) {
      const int64_t block = task / shares, share = task % shares;
      const int64_t begin = block * args.rows / blocks, end = (block + 1) * args.rows / blocks;
      kernels.linear_dense_block(args, begin, end, panels * share / shares,
                                 panels * (share + 1) / shares, scratch.at_least(bytes));
      if (args.norm_weight && shares == 1) normalise(kernels, norm, begin, end);
    }
    scratch.trim();
  });
  if (args.norm_weight && shares > 1) {  // a row is whole only now
    constexpr int64_t kElementsPerShare = 16384;
    parallel_for(args.rows, std::max<int64_t>(1, kElementsPerShare / args.outputs),
                 [&](int64_t begin, int64_t end) { normalise(kernels, norm, begin, end); });
  }
}

}  // namespace filbert
