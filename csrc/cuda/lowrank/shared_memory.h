// Whether the GPU at hand has the shared memory that large ranks need.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device/launch.cuh"

namespace filbert {
namespace cuda {

inline void check_shared_memory(const char* op, int64_t need) {
  const int64_t have = shared_memory_most();
  if (need <= have) return;
  throw std::runtime_error(std::string(op) + ": shared memory; got " + std::to_string(have) +
                           " bytes for a block of this GPU; need " + std::to_string(need) +
                           " for these ranks; try ranks of 128 at most");
}

}  // namespace cuda
}  // namespace filbert
