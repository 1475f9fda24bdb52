#pragma once

#include <cstdint>

namespace filbert {

enum class Activation : int32_t { kNone, kGelu, kGeluTanh, kRelu, kSilu };

}  // namespace filbert
