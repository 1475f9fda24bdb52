#pragma once

#include "args/attn_varlen.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

// One unit of work: some query rows of some heads of one sequence.
struct AttnTask {
  int32_t sequence;
  int32_t head_begin, head_end;
  int32_t q_begin, q_end;  // rows counted from the sequence's first
};

struct AttnVarlenKernel {
  int64_t (*scratch)(const AttnVarlenArgs& args, int64_t longest_k);  // bytes for a thread
  void (*task)(const AttnVarlenArgs& args, const AttnTask& task, void* scratch);
};
FILBERT_DECLARE_COPIES(AttnVarlenKernel, attn_varlen)

}  // namespace filbert
