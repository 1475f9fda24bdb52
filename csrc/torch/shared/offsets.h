// The checks of cu_seqlens, where the rows of each packed sequence begin and end.
#pragma once

#include "torch/shared/device.h"

namespace filbert {

// Offsets must start at 0, never fall, and stay within the rows. On a GPU nobody may wait to read
// them; there the kernels clamp them instead.
inline void check_offsets(const char* op, const Tensor& cu, int64_t rows, const char* name) {
  if (kOnGpu) return;
  const int32_t* at = static_cast<const int32_t*>(cu.const_data_ptr());
  check(at[0] == 0, op, name, at[0], "a first offset of 0",
        "prefix sums of the lengths with a leading 0");
  for (int64_t i = 1; i < cu.size(0); ++i) {
    if (at[i] < at[i - 1]) {
      std::ostringstream got;
      got << at[i - 1] << " then " << at[i] << " at place " << i;
      check(false, op, name, got.str(), "offsets that never fall", "prefix sums of the lengths");
    }
  }
  const int64_t last = at[cu.size(0) - 1];
  check(last <= rows, op, name, last, "a last offset within the packed rows",
        "offsets made from the same mask as the rows");
}

inline void check_offset_tensor(const char* op, const Tensor& cu, const Tensor& like,
                                const char* name) {
  check_same_device(cu, like, op, name);
  if (cu.scalar_type() != ScalarType::Int) {
    check(false, op, name, torch::headeronly::toString(cu.scalar_type()), "int32",
          "cu_seqlens.int()");
  }
  check(cu.dim() == 1 && cu.size(0) >= 1 && (cu.size(0) < 2 || cu.stride(0) == 1), op, name, cu,
        "a contiguous [B + 1]", "one offset per sequence and a leading 0");
}

}  // namespace filbert
