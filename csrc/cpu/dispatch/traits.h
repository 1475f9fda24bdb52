// What the rest of filbert may know about the vectors of one instruction set.
#pragma once

#include "cpu/dispatch/copies.h"

namespace filbert {

struct VectorTraits {
  int vector_bytes;
  bool bf16_pairs;  // bfloat16 products two at a time
};
FILBERT_EXPORT const VectorTraits& chosen_vector_traits();  // filbert._C asks, too
FILBERT_DECLARE_COPIES(VectorTraits, vector_traits)

}  // namespace filbert
