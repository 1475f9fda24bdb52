#pragma once

#include "args/attn_binary.h"
#include "cpu/dispatch/copies.h"

namespace filbert {

struct AttnBinaryKernel {
  int64_t (*scratch)(const AttnBinaryArgs& args, int64_t length);  // bytes for a thread
  void (*head)(const AttnBinaryArgs& args, int64_t sequence, int64_t head, void* scratch);
};
FILBERT_DECLARE_COPIES(AttnBinaryKernel, attn_binary)

}  // namespace filbert
