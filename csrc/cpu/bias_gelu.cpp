#include "cpu/bias_gelu_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {

FILBERT_CHOOSE(BiasGeluKernel, bias_gelu, FILBERT_COPIES(bias_gelu))

void bias_gelu_cpu(const BiasGeluArgs& args) {
  constexpr int64_t kElementBytes = 8;  // what an element costs
  const BiasGeluKernel& kernel = chosen_bias_gelu();
  for_rows(args.rows, args.width * kElementBytes,
           [&](int64_t begin, int64_t end) { kernel.rows(args, begin, end); });
}

}  // namespace filbert
