// The kernels of one number of bits, instantiated in a file of its own so that files compile side
// by side.
#pragma once

#include <type_traits>

#include "cuda/device/launch.cuh"
#include "cuda/linear_grouped.cuh"
#include "cuda/linear_grouped/few_rows.cuh"

namespace filbert {
namespace cuda {

template <int kBits, bool kScaled>
void multiply_grouped(const LinearGroupedArgs& args, const LinearGroupedPlan& plan, Stream stream) {
  switch (plan.kernel) {
    case GroupedKernel::kFew:
      return launch("linear_grouped (few rows)", linear_grouped_few_kernel<kBits, kScaled>,
                    plan.launch, stream, args);
    case GroupedKernel::kSmall:
      return launch("linear_grouped (small tile)",
                    linear_grouped_kernel<GroupedSmallTiling, kBits, kScaled>, plan.launch, stream,
                    args);
    case GroupedKernel::kLarge:
      using Tiling = std::conditional_t<kScaled && !kGroupedFolds<kBits>, GroupedScaledTiling,
                                        GroupedLargeTiling>;
      return launch("linear_grouped", linear_grouped_kernel<Tiling, kBits, kScaled>, plan.launch,
                    stream, args);
  }
}

#define FILBERT_GROUPED_INSTANCE(bits)                                                       \
  void multiply_grouped_##bits(const LinearGroupedArgs& args, const LinearGroupedPlan& plan, \
                               Stream stream) {                                              \
    args.multiplier ? multiply_grouped<bits, true>(args, plan, stream)                       \
                    : multiply_grouped<bits, false>(args, plan, stream);                     \
  }

}  // namespace cuda
}  // namespace filbert
