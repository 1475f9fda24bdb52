#include "cpu/linear_binary_kernel.h"

#include "args/norm_residual.h"
#include "cpu/pack_bits_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {

FILBERT_CHOOSE(LinearBinaryKernel, linear_binary, FILBERT_BIT_COPIES(linear_binary))

void linear_binary_cpu(const LinearBinaryArgs& args) {
  const LinearBinaryKernel& kernel = chosen_linear_binary();
  const int64_t row_blocks = (args.rows + kBinaryRows - 1) / kBinaryRows;
  const int64_t column_blocks = (args.outputs + kBinaryColumns - 1) / kBinaryColumns;
  // A task is a block of rows and a share of the outputs. Rows are prepared once for each task, so
  // the outputs are cut only as far as the threads need it.
  const int64_t wanted = 4 * thread_count();
  const int64_t shares =
      std::min(column_blocks, std::max<int64_t>(1, (wanted + row_blocks - 1) / row_blocks));
  const int64_t tasks = row_blocks * shares;
  // Two words of a row, an output and a plane cost as much as a byte.
  const int64_t work = args.rows * args.outputs * args.row_words * args.planes / 2;
  const int64_t hands = std::min(thread_count(), work / kShareBytes + 1);
  for_tasks(tasks, hands, kernel.scratch(args), [&](int64_t task, void* scratch) {
    const int64_t row = task / shares * kBinaryRows, share = task % shares;
    kernel.block(args, row, std::min(args.rows, row + kBinaryRows), column_blocks * share / shares,
                 column_blocks * (share + 1) / shares, scratch);
  });
  if (args.threshold) {
    const PackBitsKernel& bits = chosen_pack_bits();
    const int64_t words = (args.outputs + 31) / 32, plane = args.rows * words;
    for_rows(args.rows, words * 4, [&](int64_t begin, int64_t end) {
      bits.sum_planes(args.out_words + begin * words, plane, planes_out(args), end - begin, words,
                      args.out_sums + begin);
    });
  } else if (args.norm_weight) {  // a second pass, once all rows are written
    norm_residual_cpu(norm_of_output(args));
  }
}

}  // namespace filbert
