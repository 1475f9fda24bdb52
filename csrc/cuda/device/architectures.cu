// filbert::cuda_architectures(): which GPUs this library holds machine code for, and which toolkit
// built it. Answers "no kernel image is available" before it is asked; needs no GPU to run.
#include <torch/csrc/stable/library.h>

#include <string>

namespace filbert {
namespace {

#define FILBERT_TEXT_(x) #x
#define FILBERT_TEXT(x) FILBERT_TEXT_(x)

std::string cuda_architectures() {
  return FILBERT_CUDA_ARCHITECTURES
      ", CUDA " FILBERT_TEXT(__CUDACC_VER_MAJOR__) "." FILBERT_TEXT(__CUDACC_VER_MINOR__);
}

}  // namespace
}  // namespace filbert

STABLE_TORCH_LIBRARY_FRAGMENT(filbert, m) { m.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(filbert, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&filbert::cuda_architectures));
}
