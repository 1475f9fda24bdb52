// Which kernel a call of norm_residual runs: by width, and by where rows begin.
#include "cuda/norm_residual.cuh"

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {
namespace {

template <typename T, bool kCodes>
void norm_residual(const NormResidualArgs& args, Stream stream) {
  const int64_t size = sizeof(T), pieces = ceil_div(args.width, 32 * kEight);
  if (pieces > 4) {
    const LaunchPlan plan = plan_strided(args.rows, 1, kNormThreads, multiprocessors(),
                                         2 * kNormThreads / 32 * sizeof(float));
    return launch("norm_residual (wide)", norm_residual_wide_kernel<T, kCodes>, plan, stream, args);
  }
  const LaunchPlan plan = plan_strided(args.rows, kNormWarps, 32 * kNormWarps, multiprocessors());
  const bool whole = args.width % kEight == 0 && aligned(args.x, args.x_row * size) &&
                     aligned(args.residual, args.residual_row * size) &&
                     aligned(args.out, args.out_row * size) && aligned(args.bias) &&
                     aligned(args.weight) && aligned(args.beta);
  if (!whole) {
    return launch("norm_residual (unaligned)", norm_residual_unaligned_kernel<T, kCodes>, plan,
                  stream, args);
  }
  constexpr const char* kName = "norm_residual";
  switch (pieces) {
    case 1:
      return launch(kName, norm_residual_kernel<T, 1, kCodes>, plan, stream, args);
    case 2:
      return launch(kName, norm_residual_kernel<T, 2, kCodes>, plan, stream, args);
    case 3:
      return launch(kName, norm_residual_kernel<T, 3, kCodes>, plan, stream, args);
    default:
      return launch(kName, norm_residual_kernel<T, 4, kCodes>, plan, stream, args);
  }
}

template <typename T>
void norm_residual(const NormResidualArgs& args, Stream stream) {
  args.codes.codes ? norm_residual<T, true>(args, stream) : norm_residual<T, false>(args, stream);
}

}  // namespace
}  // namespace cuda

void norm_residual_cuda(const NormResidualArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return cuda::norm_residual<float>(args, stream);
    case DType::kBFloat16:
      return cuda::norm_residual<cuda::bf16>(args, stream);
    case DType::kFloat16:
      return cuda::norm_residual<cuda::fp16>(args, stream);
  }
}

}  // namespace filbert
