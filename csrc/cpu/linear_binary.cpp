#include "args/linear_binary.h"

#include <algorithm>
#include <memory>

#include "args/norm_residual.h"
#include "cpu/dispatch/kernels.h"
#include "cpu/threads/parallel.h"

namespace filbert {
namespace {

// LayerNorm over the product, in place: a second pass, once all rows are written.
void normalise(const LinearBinaryArgs& args) {
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
  norm_residual_cpu(norm);
}

}  // namespace

void linear_binary_cpu(const LinearBinaryArgs& args) {
  const BinaryKernels& kernels = cpu_kernels().binary;
  const int64_t row_blocks = (args.rows + kBinaryRows - 1) / kBinaryRows;
  const int64_t column_blocks = (args.outputs + kBinaryColumns - 1) / kBinaryColumns;
  // A task is a block of rows and a share of the outputs. Rows are prepared once for each task, so
  // the outputs are cut only as far as the threads need it.
  const int64_t wanted = 4 * thread_count();
  const int64_t shares =
      std::min(column_blocks, std::max<int64_t>(1, (wanted + row_blocks - 1) / row_blocks));
  const int64_t work = args.rows * args.outputs * args.row_words * args.planes;
  constexpr int64_t kWordsPerShare = 1 << 17;  // a few microseconds of work
  const int64_t tasks = row_blocks * shares;
  const int64_t grain = std::max<int64_t>(1, tasks * kWordsPerShare / std::max<int64_t>(work, 1));
  const int64_t scratch = kernels.linear_binary_scratch(args);
  parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> memory(new char[scratch + 64]);
    char* aligned = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / shares * kBinaryRows, share = task % shares;
      kernels.linear_binary_block(args, row, std::min(args.rows, row + kBinaryRows),
                                  column_blocks * share / shares,
                                  column_blocks * (share + 1) / shares, aligned);
    }
  });
  if (args.threshold) {
    const int64_t words = (args.outputs + 31) / 32, plane = args.rows * words;
    constexpr int64_t kCountsPerShare = 16384;
    parallel_for(args.rows, kCountsPerShare / std::max<int64_t>(words, 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   kernels.sum_planes(args.out_words + begin * words, plane, planes_out(args),
                                      end - begin, words, args.out_sums + begin);
                 });
  } else if (args.norm_weight) {
    normalise(args);
  }
}

}  // namespace filbert
