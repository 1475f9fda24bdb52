// Which instantiation of attn_varlen a call runs, and the kernels that need no instantiation.
#include "args/attn_varlen.h"

#include "cuda/attn_tiles.cuh"
#include "cuda/attn_tiles_plan.h"
#include "cuda/attn_varlen/f32.cuh"
#include "cuda/attn_varlen_plan.h"
#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {

template <typename T, int kDim>
void launch_attn_varlen(const AttnVarlenArgs& args, const LaunchPlan& plan, Stream stream);

namespace {

template <typename T>
void launch_for_dim(const AttnVarlenArgs& args, const LaunchPlan& plan, Stream stream) {
  switch (attn_tile_dim(args.dim)) {
    case 32:
      return launch_attn_varlen<T, 32>(args, plan, stream);
    case 64:
      return launch_attn_varlen<T, 64>(args, plan, stream);
    default:
      return launch_attn_varlen<T, 128>(args, plan, stream);
  }
}

}  // namespace
}  // namespace cuda

void attn_varlen_cuda(const AttnVarlenArgs& args, void* stream) {
  const cuda::LaunchPlan plan = cuda::plan_attn_varlen(args);
  switch (args.dtype) {
    case DType::kFloat16:
      return cuda::launch_for_dim<cuda::fp16>(args, plan, stream);
    case DType::kBFloat16:
      return cuda::launch_for_dim<cuda::bf16>(args, plan, stream);
    case DType::kFloat32:
      return cuda::launch("attn_varlen (float32)", cuda::attn_varlen_f32_kernel, plan, stream,
                          args);
  }
}

void attn_tiles_cuda(const AttnTilesArgs& args, void* stream) {
  cuda::launch("attn_tiles", cuda::attn_tiles_kernel, cuda::plan_attn_tiles(args), stream, args);
}

}  // namespace filbert
