// Which instantiation of pack_bits a call runs.
#include "cuda/pack_bits.cuh"

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {
namespace {

template <typename T, bool kWhole>
void pack_bits(const PackBitsArgs& args, Stream stream) {
  const LaunchPlan plan = plan_strided(args.rows, kPackWarps, 32 * kPackWarps, multiprocessors());
  if (args.bits) {
    launch("pack_codes", pack_bits_kernel<T, kWhole, true>, plan, stream, args);
  } else {
    launch("pack_bits", pack_bits_kernel<T, kWhole, false>, plan, stream, args);
  }
}

template <typename T>
void pack_bits(const PackBitsArgs& args, Stream stream) {
  const auto address =
      reinterpret_cast<uintptr_t>(args.x) | reinterpret_cast<uintptr_t>(args.threshold);
  const bool whole = address % 16 == 0 && args.width % kEight == 0 &&
                     args.x_row * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  whole ? pack_bits<T, true>(args, stream) : pack_bits<T, false>(args, stream);
}

}  // namespace
}  // namespace cuda

void pack_bits_cuda(const PackBitsArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return cuda::pack_bits<float>(args, stream);
    case DType::kBFloat16:
      return cuda::pack_bits<cuda::bf16>(args, stream);
    case DType::kFloat16:
      return cuda::pack_bits<cuda::fp16>(args, stream);
  }
}

}  // namespace filbert
