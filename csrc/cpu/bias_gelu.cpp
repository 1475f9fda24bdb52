#include "args/bias_gelu.h"

#include <algorithm>

#include "cpu/dispatch/kernels.h"
#include "cpu/threads/parallel.h"

namespace filbert {

void bias_gelu_cpu(const BiasGeluArgs& args) {
  constexpr int64_t kElementsPerShare = 8192;  // a few microseconds of work
  const CpuKernels& kernels = cpu_kernels();
  const int64_t grain = std::max<int64_t>(1, kElementsPerShare / std::max<int64_t>(args.width, 1));
  parallel_for(args.rows, grain,
               [&](int64_t begin, int64_t end) { kernels.bias_gelu_rows(args, begin, end); });
}

}  // namespace filbert
