// What kernels may use of the processor, as bits, and the named sets of them: the instruction sets.
#pragma once

#include <cstdint>

#define FILBERT_EXPORT __attribute__((visibility("default")))

namespace filbert {

using Features = uint32_t;
constexpr Features kAvx2 = 1 << 0;    // with FMA and F16C
constexpr Features kAvx512 = 1 << 1;  // F, BW, VL, DQ
constexpr Features kAvx512Bf16 = 1 << 2;
constexpr Features kAvx512Vpopcnt = 1 << 3;  // population counts of vectors
constexpr Features kAvx512Vnni = 1 << 4;     // four products of bytes, summed
constexpr Features kAvxVnni = 1 << 5;        // the same of 256-bit vectors, without AVX-512
constexpr Features kEmulated = 1 << 31;  // the widest kernels spelled in portable code, for tests

// An instruction set: a name that FILBERT_CPU_ISA knows, and what its kernels may use.
struct InstructionSet {
  const char* name;
  Features features;
};

// The one in use: the best for this processor, or what FILBERT_CPU_ISA / select_isa asked for.
FILBERT_EXPORT const InstructionSet& isa_in_use();

// Lets another instruction set take over; false if this build or processor has no such one.
FILBERT_EXPORT bool select_isa(const char* name);

// Those that run here, best first; the emulated one comes last. Ends with a null name.
FILBERT_EXPORT const InstructionSet* runnable_isas();

}  // namespace filbert
