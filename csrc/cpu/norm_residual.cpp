#include "args/norm_residual.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace filbert {

void norm_residual_cpu(const NormResidualArgs& args) {
  constexpr int64_t kElementsPerShare = 16384;  // a few microseconds of work
  const CpuKernels& kernels = cpu_kernels();
  const int64_t grain = std::max<int64_t>(1, kElementsPerShare / std::max<int64_t>(args.width, 1));
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(args.width + kernels.vector_bytes / sizeof(float));
    kernels.norm_residual_rows(args, begin, end, row.data());
  });
}

}  // namespace filbert
