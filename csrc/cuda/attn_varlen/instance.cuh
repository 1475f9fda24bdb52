// What an instantiation file of attn_varlen needs: one dtype and tile width to a file, so that they
// compile side by side.
#pragma once

#include "cuda/attn_varlen.cuh"
#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {

template <typename T, int kDim>
void launch_attn_varlen(const AttnVarlenArgs& args, const LaunchPlan& plan, Stream stream) {
  if (ScoreBias::any(args) || !keeps_order(args.scale)) {
    launch("attn_varlen (biased)", attn_varlen_kernel<T, kDim, true>, plan, stream, args);
  } else {
    launch("attn_varlen", attn_varlen_kernel<T, kDim, false>, plan, stream, args);
  }
}

}  // namespace cuda
}  // namespace filbert
