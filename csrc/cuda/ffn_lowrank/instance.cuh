// The kernels of one dtype, instantiated in a file of its own so that files compile side by side.
#pragma once

#include "cuda/device/launch.cuh"
#include "cuda/ffn_lowrank.cuh"

namespace filbert {
namespace cuda {

template <typename T, int kRows, int kColumns>
void run_low_rank(const FfnLowRankArgs& args, const FfnLowRankPlan& plan, Stream stream) {
  if (plan.splits == 1) {
    return launch("ffn_lowrank", ffn_lowrank_kernel<T, kRows, kColumns, false>, plan.product,
                  stream, args);
  }
  launch("ffn_lowrank (split)", ffn_lowrank_kernel<T, kRows, kColumns, true>, plan.product, stream,
         args);
  launch("ffn_lowrank (lift)", ffn_lowrank_lift_kernel<T, kRows, kColumns>, plan.lift, stream,
         args);
}

// Rows come by 64 where they are split, so no tile of 128 rows is.
template <typename T, int kColumns>
void run_low_rank(const FfnLowRankArgs& args, const FfnLowRankPlan& plan, Stream stream) {
  if (plan.tile_rows == 64) return run_low_rank<T, 64, kColumns>(args, plan, stream);
  launch("ffn_lowrank (128 rows)", ffn_lowrank_kernel<T, 128, kColumns, false>, plan.product,
         stream, args);
}

template <typename T>
void run_low_rank(const FfnLowRankArgs& args, const FfnLowRankPlan& plan, Stream stream) {
  plan.columns == 128 ? run_low_rank<T, 128>(args, plan, stream)
                      : run_low_rank<T, 256>(args, plan, stream);
}

}  // namespace cuda
}  // namespace filbert
