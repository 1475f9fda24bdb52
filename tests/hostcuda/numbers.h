// The 16-bit formats in software: widening is exact, narrowing rounds to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/device/types.h"

namespace hostcuda {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen_fp16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {  // zero or subnormal: mantissa times 2^-24
    const float size = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -size : size;
  }
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline const float* fp16_table() {
  static const auto* table = [] {
    auto* values = new std::vector<float>(65536);
    for (uint32_t i = 0; i < 65536; ++i) (*values)[i] = widen_fp16(static_cast<uint16_t>(i));
    return values;
  }();
  return table->data();
}

template <typename T>
float widen(uint16_t bits);
template <>
inline float widen<filbert::cuda::fp16>(uint16_t bits) {
  static const float* table = fp16_table();
  return table[bits];
}
template <>
inline float widen<filbert::cuda::bf16>(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}

template <typename T>
uint16_t narrow(float x);
template <>
inline uint16_t narrow<filbert::cuda::bf16>(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <>
inline uint16_t narrow<filbert::cuda::fp16>(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000) {  // subnormal: units of 2^-24, which adding 0.5 rounds to
    const float units = float_of(size) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(units) - bits_of(0.5f)));
  }
  const uint32_t rounded = size + 0xfff + (size >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

}  // namespace hostcuda
