// The one place where CPU kernels meet torch's thread pool (see csrc/cpu/threads/parallel.h).
#include "cpu/threads/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace filbert {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_ranges(int64_t n, int64_t grain, void* context, RangeBody body) {
  if (n <= grain || thread_count() == 1) {  // not worth waking the pool
    if (n > 0) body(context, 0, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace filbert
