// What the rest of filbert may know about one instruction set's copy of the kernels.
#include "cpu/dispatch/kernels.h"
#include "cpu/simd/simd.h"

namespace filbert {
namespace FILBERT_ISA {

const int vector_bytes = FILBERT_VECTOR_BYTES;
const bool bf16_pairs = FILBERT_BF16_PAIRS;

}  // namespace FILBERT_ISA
}  // namespace filbert
