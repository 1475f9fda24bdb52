// Chooses the instruction set once, by cpuid.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/dispatch/kernels.h"

namespace filbert {
namespace {

#define FILBERT_BINARY_TABLE(isa)                                              \
  BinaryKernels {                                                              \
    isa::pack_bits_rows, isa::linear_binary_scratch, isa::linear_binary_block, \
        isa::attn_binary_scratch, isa::attn_binary_head, isa::sum_planes       \
  }

#define FILBERT_TABLE(isa)                                                                     \
  CpuKernels {                                                                                 \
    #isa, isa::vector_bytes, isa::bf16_pairs, isa::attn_varlen_scratch, isa::attn_varlen_task, \
        isa::norm_residual_rows, isa::bias_gelu_rows, isa::linear_dense_rows,                  \
        isa::linear_dense_scratch, isa::linear_dense_block, FILBERT_BINARY_TABLE(isa)          \
  }

constexpr int kMaxTables = 7;

struct Tables {
  CpuKernels storage[kMaxTables];
  const CpuKernels* runnable[kMaxTables + 1] = {};
  int count = 0;

  void add(const CpuKernels& table) {
    storage[count] = table;
    runnable[count] = &storage[count];
    ++count;
  }

  Tables() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") &&
                                       __builtin_cpu_supports("fma") &&
                                       __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool avx512 =
        avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    // Population counts of vectors came independently of bfloat16: Cooper Lake has one, Ice Lake
    // the other, what came later has both.
    [[maybe_unused]] const bool vpopcnt = avx512 && __builtin_cpu_supports("avx512vpopcntdq");
#if FILBERT_HAVE_AVX512_BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) {
      CpuKernels table = FILBERT_TABLE(avx512_bf16);
      if (vpopcnt) table.binary = FILBERT_BINARY_TABLE(avx512_vpopcnt);
      add(table);
    }
#endif
#if FILBERT_HAVE_AVX512
    if (vpopcnt) {
      CpuKernels table = FILBERT_TABLE(avx512);
      table.isa = "avx512_vpopcnt";
      table.binary = FILBERT_BINARY_TABLE(avx512_vpopcnt);
      add(table);
    }
    if (avx512) add(FILBERT_TABLE(avx512));
#endif
#if FILBERT_HAVE_AVX2
    if (avx2) add(FILBERT_TABLE(avx2));
#endif
#endif
    add(FILBERT_TABLE(base));
#if FILBERT_HAVE_EMULATED
    add(FILBERT_TABLE(emulated));
#endif
  }

  const CpuKernels* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(runnable[i]->isa, name) == 0) return runnable[i];
    }
    return nullptr;
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

const CpuKernels* first_choice() {
  if (const char* wanted = std::getenv("FILBERT_CPU_ISA")) {
    if (const CpuKernels* found = tables().find(wanted)) return found;
    std::fprintf(stderr, "filbert: FILBERT_CPU_ISA=%s does not run on this machine; using %s\n",
                 wanted, tables().runnable[0]->isa);
  }
  return tables().runnable[0];
}

std::atomic<const CpuKernels*>& current() {
  static std::atomic<const CpuKernels*> instance{first_choice()};
  return instance;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *current().load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
  const CpuKernels* found = tables().find(name);
  if (found) current().store(found);
  return found != nullptr;
}

const CpuKernels* const* runnable_isas() { return tables().runnable; }

}  // namespace filbert
