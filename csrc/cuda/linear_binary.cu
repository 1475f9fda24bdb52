// Which kernels a call of linear_binary runs.
#include "cuda/linear_binary.cuh"

#include "args/norm_residual.h"
#include "cuda/device/launch.cuh"
#include "cuda/linear_binary/popcount.cuh"

namespace filbert {
namespace cuda {
namespace {

template <typename Out>
void multiply(const LinearBinaryArgs& args, Stream stream) {
  const LinearBinaryPlan plan = plan_linear_binary(args, multiprocessors(), compute_capability());
  if (!plan.tensor_cores) {
    constexpr const char* kName = "linear_binary (popcount)";
    if (plan.tile.rows == 1) {
      return launch(kName, linear_popcount_kernel<1, Out>, plan.launch, stream, args);
    }
    return launch(kName, linear_popcount_kernel<kPopcountRows, Out>, plan.launch, stream, args);
  }
  if (SmallTiling::is(plan.tile)) {
    return launch("linear_binary (small tile)", linear_binary_kernel<SmallTiling, Out>, plan.launch,
                  stream, args);
  }
  launch("linear_binary", linear_binary_kernel<LargeTiling, Out>, plan.launch, stream, args);
}

void multiply_to_bits(const LinearBinaryArgs& args, Stream stream) {
  multiply<Bit>(args, stream);
  launch("linear_binary (sums)", linear_binary_sums_kernel,
         plan_strided(args.rows, kCountWarps, 32 * kCountWarps, multiprocessors()), stream, args);
}

void multiply_to_numbers(const LinearBinaryArgs& args, Stream stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return multiply<float>(args, stream);
    case DType::kBFloat16:
      return multiply<bf16>(args, stream);
    case DType::kFloat16:
      return multiply<fp16>(args, stream);
  }
}

}  // namespace
}  // namespace cuda

void linear_binary_cuda(const LinearBinaryArgs& args, void* stream) {
  if (args.out_sums) return cuda::multiply_to_bits(args, stream);
  if (!args.norm_weight) return cuda::multiply_to_numbers(args, stream);
  LinearBinaryArgs product = args;  // the residual is added where it is normalised, in float32
  product.residual = nullptr;
  cuda::multiply_to_numbers(product, stream);
  norm_residual_cuda(norm_of_output(args), stream);
}

}  // namespace filbert
