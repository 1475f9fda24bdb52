// What every argument struct shares. No torch here, and nothing that needs the standard library.
#pragma once

#include <cstdint>

namespace filbert {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace filbert
