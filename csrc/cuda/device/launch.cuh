// The only way a kernel is started: one function, so that every launch is checked, and so that
// tests/hostcuda can run the kernel on the host instead.
#pragma once

#include <cstdint>

#include "cuda/device/once.h"
#include "cuda/device/plan.h"

#ifndef __CUDACC__
#include "hostcuda/launch.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace filbert {
namespace cuda {

using Stream = void*;  // a cudaStream_t

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("filbert: CUDA kernel ") + what + ": " +
                           cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Starts `kernel(args)` on `stream`. Nothing waits and nothing is allocated.
template <typename Args>
void launch(const char* name, void (*kernel)(Args), const LaunchPlan& plan, Stream stream,
            const Args& args) {
  if (plan.blocks == 0) return;
  if (plan.blocks > 0x7fffffff) {
    throw std::runtime_error(std::string("filbert: CUDA kernel ") + name + ": got " +
                             std::to_string(plan.blocks) +
                             " blocks, need fewer than 2^31; try a smaller batch");
  }
  if (plan.shared_bytes > 48 * 1024) {  // beyond what every kernel may have without asking
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(plan.shared_bytes)),
               name);
  }
  void* parameters[] = {const_cast<Args*>(&args)};
  check_cuda(cudaLaunchKernel(
                 reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(plan.blocks)),
                 dim3(static_cast<unsigned>(plan.threads)), parameters,
                 static_cast<size_t>(plan.shared_bytes), static_cast<cudaStream_t>(stream)),
             name);
}

// An attribute of the current device; asked for once per device.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static OncePerDevice known;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return known.get(device, [device] {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
    return value;
  });
}

inline int multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// Bytes of shared memory that a block may have.
inline int64_t shared_memory_most() {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>();
}

// Compute capability as 10 * major + minor.
inline int compute_capability() {
  return 10 * device_attribute<cudaDevAttrComputeCapabilityMajor>() +
         device_attribute<cudaDevAttrComputeCapabilityMinor>();
}

}  // namespace cuda
}  // namespace filbert

#endif
