// Which instantiation of attn_binary a call runs.
#include "cuda/attn_binary.cuh"

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {
namespace {

template <int kWords>
void attend_in(const AttnBinaryArgs& args, Stream stream) {
  const LaunchPlan plan = plan_attn_binary(args);
  if (args.table) {
    launch("attn_binary (table)", attn_binary_kernel<kWords, true>, plan, stream, args);
  } else {
    launch("attn_binary", attn_binary_kernel<kWords, false>, plan, stream, args);
  }
}

}  // namespace
}  // namespace cuda

void attn_binary_cuda(const AttnBinaryArgs& args, void* stream) {
  cuda::attn_binary_tile_words(args.dim) == 2 ? cuda::attend_in<2>(args, stream)
                                              : cuda::attend_in<4>(args, stream);
}

}  // namespace filbert
