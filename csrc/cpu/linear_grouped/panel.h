// A part of a panel, from fields of a few bits to what is multiplied. See args/linear_grouped.h.
#pragma once

#include "cpu/simd/bytes.h"

namespace filbert {
namespace FILBERT_ISA {
namespace {

constexpr int kQuads = 8;       // of a unit
constexpr int kQuadBytes = 64;  // 16 outputs by 4 inputs

constexpr int kQuadVectors = kQuadBytes / FILBERT_VECTOR_BYTES;

// Fields of kBits of quad q, from vectors of 64 bytes at `fields`: vector q % n, field q / n.
template <int kBits>
FILBERT_INLINE VecU fields_of(const uint8_t* fields, int q, int part) {
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
  const VecU v = load_bytes(fields + q % kBits * kQuadBytes + part * FILBERT_VECTOR_BYTES);
  return (v >> (q / kBits * kBits)) & kMask;
}

// The codes of quad q of a unit, in the part-th vector of its 64 bytes.
template <int kBits>
FILBERT_INLINE VecU codes_of(const uint8_t* unit, int q, int part) {
  VecU codes;
  if constexpr (kBits == 8) {
    codes = load_bytes(unit + q * kQuadBytes + part * FILBERT_VECTOR_BYTES);
  } else if constexpr (kBits == 6) {
    codes = fields_of<4>(unit, q, part) | fields_of<2>(unit + 4 * kQuadBytes, q, part) << 4;
  } else if constexpr (kBits == 3) {
    codes = fields_of<2>(unit, q, part) | fields_of<1>(unit + 2 * kQuadBytes, q, part) << 2;
  } else {
    codes = fields_of<kBits>(unit, q, part);
  }
  return codes;
}

// The same as numbers.
template <int kBits>
FILBERT_INLINE VecU numbers_of(const uint8_t* unit, int q, int part) {
  const VecU codes = codes_of<kBits>(unit, q, part);
  return (VecU)((VecUB)codes - static_cast<uint8_t>(1 << (kBits - 1)));
}

// Unpacks units of a panel to bytes [quad][16][4].
template <int kBits>
void unpack_bytes(const uint8_t* from, int64_t units, uint8_t* to) {
  for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 4
      for (int part = 0; part < kQuadVectors; ++part) {
        store_bytes(to + q * kQuadBytes + part * FILBERT_VECTOR_BYTES,
                    numbers_of<kBits>(from, q, part));
      }
    }
    from += kBits * kGroupedUnitBytes;
    to += kQuads * kQuadBytes;
  }
}

// The largest multiplier of which the products with all numbers are bytes.
template <int kBits>
constexpr int32_t kMostInBytes = 127 >> (kBits - 1);

// As unpack_bytes, times a multiplier of each output, [unit / group_units][16], at most
// kMostInBytes. Four codes of a lane are multiplied at once: no product reaches the next byte.
template <int kBits>
void unpack_products(const uint8_t* from, int64_t units, const int32_t* multipliers,
                     int64_t group_units, uint8_t* to) {
  for (int64_t u = 0; u < units; ++u) {
    VecU by[kQuadVectors], zero[kQuadVectors];
    for (int part = 0; part < kQuadVectors; ++part) {
      by[part] = (VecU)load(multipliers + u / group_units * 16 + part * kLanes);
      zero[part] = by[part] * (0x01010101u << (kBits - 1));
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 4
      for (int part = 0; part < kQuadVectors; ++part) {
        const VecU products = codes_of<kBits>(from, q, part) * by[part];
        store_bytes(to + q * kQuadBytes + part * FILBERT_VECTOR_BYTES,
                    (VecU)((VecUB)products - (VecUB)zero[part]));
      }
    }
    from += kBits * kGroupedUnitBytes;
    to += kQuads * kQuadBytes;
  }
}

// As unpack_bytes, to halves of 16 bits [quad][2][16][2]: inputs 0 and 2 of a quad, then 1 and 3.
template <int kBits>
void unpack_halves(const uint8_t* from, int64_t units, uint8_t* to) {
  for (int64_t u = 0; u < units; ++u) {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 4
      for (int part = 0; part < kQuadVectors; ++part) {
        const VecS bytes = (VecS)numbers_of<kBits>(from, q, part);
        uint8_t* at = to + q * 2 * kQuadBytes + part * FILBERT_VECTOR_BYTES;
        store_bytes(at, (VecU)(bytes << 8 >> 8));
        store_bytes(at + kQuadBytes, (VecU)(bytes >> 8));
      }
    }
    from += kBits * kGroupedUnitBytes;
    to += kQuads * 2 * kQuadBytes;
  }
}

}  // namespace
}  // namespace FILBERT_ISA
}  // namespace filbert
