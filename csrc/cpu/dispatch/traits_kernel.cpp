#include "cpu/dispatch/traits.h"
#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {

const VectorTraits vector_traits = {FILBERT_VECTOR_BYTES, FILBERT_BF16_PAIRS};

}  // namespace FILBERT_ISA
}  // namespace filbert
