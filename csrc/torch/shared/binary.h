// What the bindings of the binary operators share.
#pragma once

#include "args/pack_bits.h"
#include "torch/shared/device.h"

namespace filbert {

inline Ties ties_of(const std::string& name, const char* op, const char* what) {
  if (name == "below") return Ties::kBelow;
  if (name == "above") return Ties::kAbove;
  check(name == "exact", op, what, name, "'below', 'above' or 'exact'", "ties='below'");
  return Ties::kExact;
}

inline void check_type(const Tensor& t, ScalarType type, const char* op, const char* name) {
  if (t.scalar_type() == type) return;
  check(false, op, (std::string("dtype of ") + name).c_str(),
        torch::headeronly::toString(t.scalar_type()), torch::headeronly::toString(type),
        "the tensor as another filbert operator or module made it");
}

// Kernels count rows in 32 bits; checked before anything of that size is made.
inline void check_row_count(int64_t rows, const char* op, const char* what) {
  check(rows <= 0x7fffffff, op, what, rows, "fewer than 2^31", "a part of the batch at a time");
}

// A contiguous vector of n elements of a fixed type.
inline void check_vector_of(const Tensor& t, ScalarType type, int64_t n, const Tensor& like,
                            const char* op, const char* name) {
  check_same_device(t, like, op, name);
  check_type(t, type, op, name);
  check(t.dim() == 1 && t.size(0) == n && (n < 2 || t.stride(0) == 1), op, name, t,
        "a contiguous vector, one value for each row or channel it belongs to",
        "tensor.contiguous()");
}

inline Tensor empty_words(const Tensor& like, int64_t planes, int64_t rows, int64_t features) {
  return torch::stable::new_empty(like, {planes, rows, bit_words(features)}, ScalarType::Int);
}

inline Tensor empty_sums(const Tensor& like, int64_t rows) {
  return torch::stable::new_empty(like, {rows}, ScalarType::Int);
}

}  // namespace filbert
