// How one attention call is cut into tasks. A pure function of the call's shape, so that it can be
// tested and printed without running anything.
#pragma once

#include <vector>

#include "cpu/attn_varlen_kernel.h"

namespace filbert {

struct AttnPlan {
  std::vector<AttnTask> tasks;  // largest first
  int64_t heads_per_task;
  int64_t longest_k;      // of the sequences that have work to do
  int64_t scratch_bytes;  // for each thread
  int64_t multiply_adds;  // of both products, padding of tiles not counted
};

FILBERT_EXPORT AttnPlan plan_attn_varlen(const AttnVarlenArgs& args, int64_t threads);

}  // namespace filbert
