// What every binding shares: error messages and the way from Tensor to pointer.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "args/common.h"

namespace filbert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How a value reads in a message: a tensor by its shape, anything else as it is.
template <typename Value>
inline void describe(std::ostream& text, const Value& value) {
  text << value;
}
inline void describe(std::ostream& text, const Tensor& t) {
  text << "[";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << "]";
}

// Throws "op: what; got ...; need ...; try ..." unless ok. The message is put together on failure
// only; what is passed should cost nothing before that.
template <typename Got>
inline void check(bool ok, const char* op, const char* what, const Got& got, const char* need,
                  const char* hint) {
  if (ok) return;
  std::ostringstream message;
  message << op << ": " << what << "; got ";
  describe(message, got);
  message << "; need " << need << "; try " << hint;
  throw std::runtime_error(message.str());
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(t.get_device_index());
}

// Checks that t is on the device of `like`, the first operand. The dispatcher does not: it takes
// the kernels of one of the operands' devices, whichever comes first in its own order.
inline void check_same_device(const Tensor& t, const Tensor& like, const char* op,
                              const char* name) {
  if (t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index()) return;
  const std::string need = device_name(like);
  check(false, op, (std::string("device of ") + name).c_str(), device_name(t),
        (need + ", as the first operand").c_str(), (name + (".to('" + need) + "')").c_str());
}

// Checks that t is an operand of the same dtype on the same device as `like`.
inline void check_like(const Tensor& t, const Tensor& like, const char* op, const char* name) {
  check_same_device(t, like, op, name);
  if (t.scalar_type() != like.scalar_type()) {
    check(false, op, (std::string("dtype of ") + name).c_str(),
          torch::headeronly::toString(t.scalar_type()),
          torch::headeronly::toString(like.scalar_type()), "one dtype for all operands");
  }
}

// Checks that t is a dense [n] operand like `like`.
inline void check_vector(const Tensor& t, int64_t n, const Tensor& like, const char* op,
                         const char* name) {
  check_like(t, like, op, name);
  if (t.dim() == 1 && t.size(0) == n && (n < 2 || t.stride(0) == 1)) return;
  std::ostringstream need;
  need << "a contiguous [" << n << "]";
  check(false, op, name, t, need.str().c_str(), "tensor.contiguous() of the right length");
}

}  // namespace filbert
