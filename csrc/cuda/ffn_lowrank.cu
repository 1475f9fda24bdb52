// Which kernels a call of ffn_lowrank runs, and LayerNorm after them.
#include "cuda/ffn_lowrank_plan.h"

#include "args/norm_residual.h"
#include "cuda/device/launch.cuh"
#include "cuda/lowrank/shared_memory.h"

namespace filbert {
namespace cuda {

void ffn_lowrank_bf16(const FfnLowRankArgs&, const FfnLowRankPlan&, Stream);
void ffn_lowrank_fp16(const FfnLowRankArgs&, const FfnLowRankPlan&, Stream);

}  // namespace cuda

int64_t ffn_lowrank_partial_values(const FfnLowRankArgs& args) {
  const cuda::FfnLowRankPlan plan = cuda::plan_ffn_lowrank(args);
  return plan.splits == 1 ? 0 : plan.splits * args.rows * plan.columns;
}

void ffn_lowrank_cuda(const FfnLowRankArgs& given, void* stream) {
  const cuda::FfnLowRankPlan plan = cuda::plan_ffn_lowrank(given);
  cuda::check_shared_memory("ffn_lowrank", plan.product.shared_bytes);
  FfnLowRankArgs args = given;
  args.splits = plan.splits;
  args.dtype == DType::kBFloat16 ? cuda::ffn_lowrank_bf16(args, plan, stream)
                                 : cuda::ffn_lowrank_fp16(args, plan, stream);
  if (args.norm_weight) norm_residual_cuda(norm_of_output(args), stream);
}

}  // namespace filbert
