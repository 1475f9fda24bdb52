#include "cuda/ffn_lowrank/instance.cuh"

namespace filbert {
namespace cuda {

void ffn_lowrank_bf16(const FfnLowRankArgs& args, const FfnLowRankPlan& plan, Stream stream) {
  run_low_rank<bf16>(args, plan, stream);
}

}  // namespace cuda
}  // namespace filbert
