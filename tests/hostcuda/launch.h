// csrc/cuda/device/launch.cuh for the host.
#pragma once

#include "cuda/device/plan.h"
#include "hostcuda/machine.h"

namespace filbert {
namespace cuda {

using Stream = void*;

template <typename Args>
void launch(const char* name, void (*kernel)(Args), const LaunchPlan& plan, Stream,
            const Args& args) {
  if (plan.blocks == 0) return;
  hostcuda::run(name, plan.blocks, plan.threads, plan.shared_bytes,
                [kernel, args] { kernel(args); });
}

// One: so few blocks that kernels which stride over their work really do.
inline int multiprocessors() { return 1; }

// Compute capability as 10 * major + minor: 9.0, or what a test pretends.
inline int compute_capability() { return hostcuda::capability(); }

inline int64_t shared_memory_most() { return hostcuda::shared_most(); }

}  // namespace cuda
}  // namespace filbert
