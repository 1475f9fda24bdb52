// Which kernel a call of linear_lowrank runs, and LayerNorm after it.
#include "cuda/linear_lowrank.cuh"

#include "args/linear_lowrank.h"
#include "args/norm_residual.h"
#include "cuda/device/launch.cuh"
#include "cuda/lowrank/shared_memory.h"

namespace filbert {
namespace cuda {
namespace {

template <typename T, int kColumns>
void run_linear(const FfnLowRankArgs& args, const FfnLowRankPlan& plan, Stream stream) {
  plan.tile_rows == 64
      ? launch("linear_lowrank", linear_lowrank_kernel<T, 64, kColumns>, plan.product, stream, args)
      : launch("linear_lowrank (128 rows)", linear_lowrank_kernel<T, 128, kColumns>, plan.product,
               stream, args);
}

template <typename T>
void run_linear(const FfnLowRankArgs& args, const FfnLowRankPlan& plan, Stream stream) {
  plan.columns == 128 ? run_linear<T, 128>(args, plan, stream)
                      : run_linear<T, 256>(args, plan, stream);
}

// As a feed-forward part without what is between its outer factors.
FfnLowRankArgs as_block(const LinearLowRankArgs& given) {
  FfnLowRankArgs args{};
  args.dtype = args.weight_dtype = given.dtype;
  args.x = given.x;
  args.up.a = given.factors.a;
  args.down.b = given.factors.b;
  args.down.bias = given.factors.bias;
  args.up.rank = args.down.rank = given.factors.rank;
  args.up.held = args.down.held = given.factors.held;
  args.residual = given.residual;
  args.norm_weight = given.norm_weight;
  args.norm_bias = given.norm_bias;
  args.out = given.out;
  args.x_row = given.x_row;
  args.residual_row = given.residual_row;
  args.rows = given.rows;
  args.inputs = given.inputs;
  args.outputs = given.outputs;
  args.activation = given.activation;
  args.eps = given.eps;
  return args;
}

}  // namespace
}  // namespace cuda

void linear_lowrank_cuda(const LinearLowRankArgs& given, void* stream) {
  const FfnLowRankArgs args = cuda::as_block(given);
  const cuda::FfnLowRankPlan plan = cuda::plan_ffn_lowrank(args);
  cuda::check_shared_memory("linear_lowrank", plan.product.shared_bytes);
  args.dtype == DType::kBFloat16 ? cuda::run_linear<cuda::bf16>(args, plan, stream)
                                 : cuda::run_linear<cuda::fp16>(args, plan, stream);
  if (args.norm_weight) norm_residual_cuda(norm_of_output(args), stream);
}

}  // namespace filbert
