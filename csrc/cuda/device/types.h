// The 16-bit formats by which kernels are instantiated. They only hold bits: arithmetic is float32.
#pragma once

#include <cstdint>

namespace filbert {
namespace cuda {

struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

}  // namespace cuda
}  // namespace filbert
