// Which kernel a call over rows runs: norm_residual, bias_gelu_ and gather_rows.
#include "cuda/bias_gelu.cuh"
#include "cuda/gather_rows.cuh"
#include "cuda/device/kernels.h"
#include "cuda/device/launch.cuh"
#include "cuda/norm_residual.cuh"

namespace filbert {
namespace cuda {
namespace {

// Whether every row of an operand starts at a multiple of 16 bytes; true for an absent one.
bool aligned(const void* p, int64_t stride_bytes = 0) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

template <typename T>
void norm_residual(const NormResidualArgs& args, Stream stream) {
  const int64_t size = sizeof(T), pieces = ceil_div(args.width, 32 * kEight);
  if (pieces > 4) {
    const LaunchPlan plan = plan_strided(args.rows, 1, kNormThreads, multiprocessors(),
                                         kNormThreads / 32 * sizeof(float));
    return launch("norm_residual (wide)", norm_residual_wide_kernel<T>, plan, stream, args);
  }
  const LaunchPlan plan = plan_strided(args.rows, kNormWarps, 32 * kNormWarps, multiprocessors());
  const bool whole = args.width % kEight == 0 && aligned(args.x, args.x_row * size) &&
                     aligned(args.residual, args.residual_row * size) &&
                     aligned(args.out, args.out_row * size) && aligned(args.bias) &&
                     aligned(args.weight) && aligned(args.beta);
  if (!whole) {
    return launch("norm_residual (unaligned)", norm_residual_unaligned_kernel<T>, plan, stream,
                  args);
  }
  constexpr const char* kName = "norm_residual";
  switch (pieces) {
    case 1:
      return launch(kName, norm_residual_kernel<T, 1>, plan, stream, args);
    case 2:
      return launch(kName, norm_residual_kernel<T, 2>, plan, stream, args);
    case 3:
      return launch(kName, norm_residual_kernel<T, 3>, plan, stream, args);
    default:
      return launch(kName, norm_residual_kernel<T, 4>, plan, stream, args);
  }
}

template <typename T, bool kTanh>
void bias_gelu(const BiasGeluArgs& args, Stream stream) {
  const int64_t values = args.rows * args.width;
  if (args.width % kEight == 0 && aligned(args.x) && aligned(args.bias)) {
    const LaunchPlan plan =
        plan_strided(values / kEight, kGeluThreads, kGeluThreads, multiprocessors());
    return launch("bias_gelu_", bias_gelu_kernel<T, kTanh>, plan, stream, args);
  }
  const LaunchPlan plan = plan_strided(values, kGeluThreads, kGeluThreads, multiprocessors());
  launch("bias_gelu_ (any width)", bias_gelu_any_kernel<T, kTanh>, plan, stream, args);
}

template <typename T>
void bias_gelu(const BiasGeluArgs& args, Stream stream) {
  args.tanh ? bias_gelu<T, true>(args, stream) : bias_gelu<T, false>(args, stream);
}

template <typename Unit>
bool fits(const GatherRowsArgs& args) {
  const auto bits = reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.out) |
                    static_cast<uintptr_t>(args.row_bytes) |
                    static_cast<uintptr_t>(args.x_row_stride);
  return bits % sizeof(Unit) == 0;
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

void bias_gelu_cuda(const BiasGeluArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return cuda::bias_gelu<float>(args, stream);
    case DType::kBFloat16:
      return cuda::bias_gelu<cuda::bf16>(args, stream);
    case DType::kFloat16:
      return cuda::bias_gelu<cuda::fp16>(args, stream);
  }
}

void gather_rows_cuda(const GatherRowsArgs& args, void* stream) {
  using namespace cuda;
  const LaunchPlan plan =
      plan_strided(args.rows, kGatherWarps, 32 * kGatherWarps, multiprocessors());
  constexpr const char* kName = "gather_rows";
  if (fits<uint4>(args)) return launch(kName, gather_rows_kernel<uint4>, plan, stream, args);
  if (fits<uint32_t>(args)) return launch(kName, gather_rows_kernel<uint32_t>, plan, stream, args);
  if (fits<uint16_t>(args)) return launch(kName, gather_rows_kernel<uint16_t>, plan, stream, args);
  launch(kName, gather_rows_kernel<uint8_t>, plan, stream, args);
}

}  // namespace filbert
