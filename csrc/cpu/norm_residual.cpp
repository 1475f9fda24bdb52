#include "args/norm_residual.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch/kernels.h"
#include "cpu/threads/parallel.h"

namespace filbert {

void norm_residual_cpu(const NormResidualArgs& args) {
  constexpr int64_t kElementsPerShare = 16384;  // a few microseconds of work
  const CpuKernels& kernels = cpu_kernels();
  const int64_t grain = std::max<int64_t>(1, kElementsPerShare / std::max<int64_t>(args.width, 1));
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    // The sum of a row, and bias, weight and beta, each rounded up to whole vectors.
    std::vector<float> scratch(4 * (args.width + kernels.vector_bytes / sizeof(float)));
    kernels.norm_residual_rows(args, begin, end, scratch.data());
  });
}

}  // namespace filbert
