#include "cuda/embedding_grouped.cuh"

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {
namespace {

template <typename T>
void embedding_grouped(const EmbeddingGroupedArgs& args, Stream stream) {
  launch("embedding_grouped", embedding_grouped_kernel<T>,
         plan_strided(args.rows, kEmbeddingWarps, 32 * kEmbeddingWarps, multiprocessors()), stream,
         args);
}

}  // namespace
}  // namespace cuda

void embedding_grouped_cuda(const EmbeddingGroupedArgs& args, void* stream) {
  switch (args.dtype) {
    case DType::kFloat32:
      return cuda::embedding_grouped<float>(args, stream);
    case DType::kBFloat16:
      return cuda::embedding_grouped<cuda::bf16>(args, stream);
    case DType::kFloat16:
      return cuda::embedding_grouped<cuda::fp16>(args, stream);
  }
}

}  // namespace filbert
