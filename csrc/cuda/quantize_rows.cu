// Which instantiation of quantize_rows a call runs.
#include "cuda/quantize_rows.cuh"

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {
namespace {

template <typename T>
void quantize_rows(const QuantizeRowsArgs& args, Stream stream) {
  const LaunchPlan plan =
      plan_strided(args.rows, kQuantizeWarps, 32 * kQuantizeWarps, multiprocessors());
  const bool whole = args.width % kEight == 0 && aligned(args.x, args.x_row * sizeof(T)) &&
                     reinterpret_cast<uintptr_t>(args.out.codes) % 8 == 0 &&
                     args.out.codes_row % 8 == 0;
  whole ? launch("quantize_rows", quantize_rows_kernel<T, true>, plan, stream, args)
        : launch("quantize_rows (any width)", quantize_rows_kernel<T, false>, plan, stream, args);
}

}  // namespace
}  // namespace cuda

void quantize_rows_cuda(const QuantizeRowsArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return cuda::quantize_rows<float>(args, stream);
    case DType::kBFloat16:
      return cuda::quantize_rows<cuda::bf16>(args, stream);
    case DType::kFloat16:
      return cuda::quantize_rows<cuda::fp16>(args, stream);
  }
}

}  // namespace filbert
