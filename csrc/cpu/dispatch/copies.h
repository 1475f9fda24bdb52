// The copies of a kernel, one for each instruction set it is compiled for, and the choice of one.
//
// A kernel offers a record of function pointers. csrc/cpu/<stem>_kernel.cpp defines the record in
// the namespace of the copy, <stem>_kernel.h declares it, and <stem>.cpp lists the copies:
//
//   struct BiasGeluKernel { void (*rows)(...); };
//   FILBERT_DECLARE_COPIES(BiasGeluKernel, bias_gelu)
//   const BiasGeluKernel bias_gelu = {rows};                           in namespace FILBERT_ISA
//   FILBERT_CHOOSE(BiasGeluKernel, bias_gelu, FILBERT_COPIES(bias_gelu))
//
// chosen_bias_gelu() is then the first copy that needs no more than the instruction set in use has.
// A kernel that gains from one more feature lists one more copy; the others know nothing of it.
#pragma once

#include "cpu/dispatch/features.h"

namespace filbert {

template <typename Kernel>
struct Copy {
  Features needs;
  const Kernel* kernel;
};

template <typename Kernel, int kCount>
const Kernel& first_that_runs(const Copy<Kernel> (&copies)[kCount]) {
  const Features features = isa_in_use().features;
  int i = 0;
  while (copies[i].needs & ~features) ++i;  // the last one, base, needs nothing
  return *copies[i].kernel;
}

#define FILBERT_DECLARE_COPIES(Kernel, name) \
  namespace base {                           \
  extern const Kernel name;                  \
  }                                          \
  namespace avx2 {                           \
  extern const Kernel name;                  \
  }                                          \
  namespace avx512 {                         \
  extern const Kernel name;                  \
  }                                          \
  namespace avx512_bf16 {                    \
  extern const Kernel name;                  \
  }                                          \
  namespace avx512_vpopcnt {                 \
  extern const Kernel name;                  \
  }                                          \
  namespace avx512_vnni {                    \
  extern const Kernel name;                  \
  }                                          \
  namespace avx2_vnni {                      \
  extern const Kernel name;                  \
  }                                          \
  namespace emulated {                       \
  extern const Kernel name;                  \
  }                                          \
  const Kernel& chosen_##name();

// FILBERT_HAVE_<COPY> is set by cmake/CpuIsa.cmake where such copies are built.
#if FILBERT_HAVE_EMULATED
#define FILBERT_COPY_EMULATED(name) {kEmulated, &emulated::name},
#else
#define FILBERT_COPY_EMULATED(name)
#endif
#if FILBERT_HAVE_AVX512_VPOPCNT
#define FILBERT_COPY_AVX512_VPOPCNT(name) {kAvx512 | kAvx512Vpopcnt, &avx512_vpopcnt::name},
#else
#define FILBERT_COPY_AVX512_VPOPCNT(name)
#endif
#if FILBERT_HAVE_AVX512_BF16
#define FILBERT_COPY_AVX512_BF16(name) {kAvx512 | kAvx512Bf16, &avx512_bf16::name},
#else
#define FILBERT_COPY_AVX512_BF16(name)
#endif
#if FILBERT_HAVE_AVX512_VNNI
#define FILBERT_COPY_AVX512_VNNI(name) {kAvx512 | kAvx512Vnni, &avx512_vnni::name},
#else
#define FILBERT_COPY_AVX512_VNNI(name)
#endif
#if FILBERT_HAVE_AVX2_VNNI
#define FILBERT_COPY_AVX2_VNNI(name) {kAvx2 | kAvxVnni, &avx2_vnni::name},
#else
#define FILBERT_COPY_AVX2_VNNI(name)
#endif
#if FILBERT_HAVE_AVX512
#define FILBERT_COPY_AVX512(name) {kAvx512, &avx512::name},
#else
#define FILBERT_COPY_AVX512(name)
#endif
#if FILBERT_HAVE_AVX2
#define FILBERT_COPY_AVX2(name) {kAvx2, &avx2::name},
#else
#define FILBERT_COPY_AVX2(name)
#endif
#define FILBERT_COPY_BASE(name) {0, &base::name},

// Kernels over floats, over bits, and over bytes: what filbert_stem in cmake/Stems.cmake builds.
#define FILBERT_COPIES(name)     \
  FILBERT_COPY_EMULATED(name)    \
  FILBERT_COPY_AVX512_BF16(name) \
  FILBERT_COPY_AVX512(name) FILBERT_COPY_AVX2(name) FILBERT_COPY_BASE(name)
#define FILBERT_BIT_COPIES(name)    \
  FILBERT_COPY_EMULATED(name)       \
  FILBERT_COPY_AVX512_VPOPCNT(name) \
  FILBERT_COPY_AVX512(name) FILBERT_COPY_AVX2(name) FILBERT_COPY_BASE(name)
#define FILBERT_BYTE_COPIES(name) \
  FILBERT_COPY_EMULATED(name)     \
  FILBERT_COPY_AVX512_VNNI(name)  \
  FILBERT_COPY_AVX512(name)       \
  FILBERT_COPY_AVX2_VNNI(name)    \
  FILBERT_COPY_AVX2(name) FILBERT_COPY_BASE(name)

#define FILBERT_CHOOSE(Kernel, name, ...)                    \
  const Kernel& chosen_##name() {                            \
    static constexpr Copy<Kernel> kCopies[] = {__VA_ARGS__}; \
    return first_that_runs(kCopies);                         \
  }

}  // namespace filbert
