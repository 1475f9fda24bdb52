// The device a binding is built for. The bindings are the same for all of them; this file is what
// differs: the dispatch key, the dtypes, whose stream, and which kernels are behind run().
//
// csrc/torch is compiled into libfilbert_ops (CPU), libfilbert_cuda (FILBERT_CUDA), and for the
// tests into libfilbert_hostcuda (FILBERT_HOSTCUDA): the CUDA kernels run by the host, on CPU
// tensors that are copied to pretended device memory for each call.
#pragma once

#include "torch/shared/common.h"

#if defined(FILBERT_HOSTCUDA)
#include "hostcuda/operands.h"
#define FILBERT_NAMESPACE filbert_hostcuda
#define FILBERT_DISPATCH_KEY CPU
#elif defined(FILBERT_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define FILBERT_NAMESPACE filbert
#define FILBERT_DISPATCH_KEY CUDA
#else
#define FILBERT_NAMESPACE filbert
#define FILBERT_DISPATCH_KEY CPU
#endif

// STABLE_TORCH_LIBRARY_IMPL for this build's namespace and key.
#define FILBERT_LIBRARY_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define FILBERT_LIBRARY_IMPL(m) FILBERT_LIBRARY_IMPL_(FILBERT_NAMESPACE, FILBERT_DISPATCH_KEY, m)

namespace filbert {

#if defined(FILBERT_CUDA) || defined(FILBERT_HOSTCUDA)
constexpr bool kOnGpu = true;  // values cannot be read by the host without waiting for the device
#else
constexpr bool kOnGpu = false;
#endif

inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return DType::kFloat32;
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  if (kOnGpu && type == ScalarType::Half) return DType::kFloat16;
  check(false, op, (std::string("dtype of ") + name).c_str(), torch::headeronly::toString(type),
        kOnGpu ? "float16, bfloat16 or float32" : "float32 or bfloat16 on the CPU",
        "tensor.float() or tensor.bfloat16()");
  return DType::kFloat32;
}

#if defined(FILBERT_HOSTCUDA)

// Operands go to guarded memory as they are named, and come back when the call is over.
class Call {
 public:
  explicit Call(const Tensor&) {}

  template <typename T = void>
  const T* read(const Tensor& t) {
    return static_cast<const T*>(operands_.read(view(t)));
  }
  template <typename T = void>
  T* write(Tensor& t) {
    return static_cast<T*>(operands_.write(view(t)));
  }
  template <typename T = void>
  T* update(Tensor& t) {
    return static_cast<T*>(operands_.update(view(t)));
  }
  void* stream() const { return nullptr; }
  // Brings results back; left out when the kernel threw.
  void finish() { operands_.finish(); }

 private:
  static hostcuda::View view(const Tensor& t) {
    hostcuda::View view{const_cast<void*>(t.const_data_ptr()), t.element_size(), {}, {}};
    for (int64_t d = 0; d < t.dim(); ++d) {
      view.sizes.push_back(t.size(d));
      view.strides.push_back(t.stride(d));
    }
    return view;
  }

  hostcuda::Operands operands_;
};

#else

// One call of an operator: makes the tensors' device current, and knows its stream.
class Call {
 public:
#if defined(FILBERT_CUDA)
  explicit Call(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }
#else
  explicit Call(const Tensor&) {}
#endif

  // A pointer to what the kernel reads, to what it fills, and to what it does both with.
  template <typename T = void>
  const T* read(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
  }
  template <typename T = void>
  T* write(Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
  }
  template <typename T = void>
  T* update(Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
  }
  void finish() {}

 private:
#if defined(FILBERT_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

#endif

}  // namespace filbert

// Runs a stem's kernel on this build's device.
#if defined(FILBERT_CUDA) || defined(FILBERT_HOSTCUDA)
#define FILBERT_RUN(stem, args, call) stem##_cuda(args, (call).stream())
#else
#define FILBERT_RUN(stem, args, call) stem##_cpu(args)
#endif
