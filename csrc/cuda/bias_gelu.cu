// Which kernel a call of bias_gelu_ runs: eight values a thread where they lie so.
#include "cuda/bias_gelu.cuh"

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {
namespace {

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

}  // namespace
}  // namespace cuda

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

}  // namespace filbert
