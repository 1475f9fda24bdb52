#include "cpu/norm_residual_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {

FILBERT_CHOOSE(NormResidualKernel, norm_residual, FILBERT_COPIES(norm_residual))

void norm_residual_cpu(const NormResidualArgs& args) {
  constexpr int64_t kElementBytes = 4;  // what an element costs
  const NormResidualKernel& kernel = chosen_norm_residual();
  for_rows(
      args.rows, args.width * kElementBytes, kernel.scratch(args),
      [&](int64_t begin, int64_t end, void* scratch) { kernel.rows(args, begin, end, scratch); });
}

}  // namespace filbert
