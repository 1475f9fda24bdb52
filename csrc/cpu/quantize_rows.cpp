#include "cpu/quantize_rows_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {

FILBERT_CHOOSE(QuantizeRowsKernel, quantize_rows, FILBERT_COPIES(quantize_rows))

void quantize_rows_cpu(const QuantizeRowsArgs& args) {
  constexpr int64_t kElementBytes = 4;  // what an element costs
  const QuantizeRowsKernel& kernel = chosen_quantize_rows();
  for_rows(args.rows, args.width * kElementBytes,
           [&](int64_t begin, int64_t end) { kernel.rows(args, begin, end); });
}

}  // namespace filbert
