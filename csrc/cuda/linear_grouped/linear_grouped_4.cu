#include "cuda/linear_grouped/instance.cuh"

namespace filbert {
namespace cuda {

FILBERT_GROUPED_INSTANCE(4)

}  // namespace cuda
}  // namespace filbert
