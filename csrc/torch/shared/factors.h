// What operators with weights of low rank check.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "args/ffn_lowrank.h"
#include "torch/shared/dense.h"

namespace filbert {

// A factor for a GPU: rows that follow each other, both sides padded to multiples of 16.
inline void check_padded(const Tensor& factor, int64_t outputs, int64_t inputs, const char* op,
                         const char* name) {
  const auto padded = [](int64_t n) { return (n + 15) / 16 * 16; };
  const bool fits = factor.dim() == 2 && factor.size(0) == padded(outputs) &&
                    factor.size(1) == padded(inputs) && factor.is_contiguous() &&
                    reinterpret_cast<uintptr_t>(factor.const_data_ptr()) % 16 == 0;
  if (fits) return;
  std::ostringstream need;
  need << "a contiguous [" << padded(outputs) << ", " << padded(inputs) << "] for " << outputs
       << " outputs of " << inputs << " inputs";
  check(false, op, name, factor, need.str().c_str(), "pad_factor of the [N, K] factor");
}

// What the kernels for a GPU cannot do.
inline void check_for_gpu(const char* op, DType dtype,
                          std::initializer_list<std::pair<int64_t, const char*>> sizes,
                          int64_t rank, const Tensor& x) {
  constexpr const char* kHint = "torch.nn.functional.linear for each factor";
  check(dtype != DType::kFloat32, op, "dtype of x", "float32", "float16 or bfloat16 on a GPU",
        "x.half()");
  for (const auto& [size, name] : sizes) {
    check(size % 8 == 0, op, name, size, "a multiple of 8 on a GPU", kHint);
  }
  check(rank <= kLowRankMostRankCuda, op, "rank", rank, "256 at most on a GPU", kHint);
  const bool aligned =
      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.stride(0) % 8 == 0;
  check(aligned || x.size(0) < 1, op, "x", x, "rows that begin at multiples of 16 bytes",
        "x.contiguous().clone()");
}

// The rank that a second factor was packed with, at least `rank`. It is rounded up as the layout
// is: on a GPU to 16, and in bfloat16 on a CPU to a pair, whose other half is zero.
inline int64_t held_of(const Tensor& b, DType dtype, int64_t rank) {
  const int64_t steps = b.dim() >= 2 ? b.size(1) : 0;
  if (kOnGpu) return std::max((rank + 15) / 16 * 16, steps);
  return std::max(rank, dtype == DType::kBFloat16 ? 2 * steps : steps);
}

}  // namespace filbert
