// Asks the processor once, and holds the instruction set in use.
#include "cpu/dispatch/features.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/dispatch/traits.h"

namespace filbert {
namespace {

// What this processor has and this build has a copy for.
Features features_here() {
  Features found = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
#if FILBERT_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    found |= kAvx2;
    if (__builtin_cpu_supports("avxvnni")) found |= kAvxVnni;
  }
#endif
#if FILBERT_HAVE_AVX512
  if (found && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found |= kAvx512;
    // These came independently of each other: Cascade Lake has the products of bytes alone, Cooper
    // Lake has bfloat16 too, Ice Lake has population counts, what came later has all of them.
    if (__builtin_cpu_supports("avx512bf16")) found |= kAvx512Bf16;
    if (__builtin_cpu_supports("avx512vpopcntdq")) found |= kAvx512Vpopcnt;
    if (__builtin_cpu_supports("avx512vnni")) found |= kAvx512Vnni;
  }
#endif
#endif
  return found;
}

struct InstructionSets {
  static constexpr int kMost = 8;
  InstructionSet runnable[kMost + 1] = {};
  int count = 0;

  InstructionSets() {
    const Features here = features_here();
    const auto add = [&](const char* name, Features needs, Features also = 0) {
      if (!(needs & ~here)) runnable[count++] = {name, needs | (also & here)};
    };
    add("avx512_bf16", kAvx2 | kAvx512 | kAvx512Bf16, kAvx512Vpopcnt | kAvx512Vnni);
    add("avx512_vpopcnt", kAvx2 | kAvx512 | kAvx512Vpopcnt, kAvx512Vnni);
    add("avx512_vnni", kAvx2 | kAvx512 | kAvx512Vnni);
    add("avx512", kAvx2 | kAvx512);
    add("avx2_vnni", kAvx2 | kAvxVnni);
    add("avx2", kAvx2);
    add("base", 0);
#if FILBERT_HAVE_EMULATED
    runnable[count++] = {"emulated", kEmulated};
#endif
  }

  const InstructionSet* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(runnable[i].name, name) == 0) return &runnable[i];
    }
    return nullptr;
  }
};

const InstructionSets& sets() {
  static const InstructionSets instance;
  return instance;
}

const InstructionSet* first_choice() {
  if (const char* wanted = std::getenv("FILBERT_CPU_ISA")) {
    if (const InstructionSet* found = sets().find(wanted)) return found;
    std::fprintf(stderr, "filbert: FILBERT_CPU_ISA=%s does not run on this machine; using %s\n",
                 wanted, sets().runnable[0].name);
  }
  return &sets().runnable[0];
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> instance{first_choice()};
  return instance;
}

}  // namespace

const InstructionSet& isa_in_use() { return *current().load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
  const InstructionSet* found = sets().find(name);
  if (found) current().store(found);
  return found != nullptr;
}

const InstructionSet* runnable_isas() { return sets().runnable; }

FILBERT_CHOOSE(VectorTraits, vector_traits, FILBERT_COPIES(vector_traits))

}  // namespace filbert
