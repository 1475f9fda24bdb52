#pragma once

#include "args/embedding_grouped.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct EmbeddingGroupedKernel {
  void (*rows)(const EmbeddingGroupedArgs& args, int64_t begin, int64_t end);
};
FILBERT_DECLARE_COPIES(EmbeddingGroupedKernel, embedding_grouped)

}  // namespace filbert
