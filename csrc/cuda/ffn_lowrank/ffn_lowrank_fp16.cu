#include "cuda/ffn_lowrank/instance.cuh"

namespace filbert {
namespace cuda {

void ffn_lowrank_fp16(const FfnLowRankArgs& args, const FfnLowRankPlan& plan, Stream stream) {
  run_low_rank<fp16>(args, plan, stream);
}

}  // namespace cuda
}  // namespace filbert
