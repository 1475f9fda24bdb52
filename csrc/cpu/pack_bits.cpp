#include "cpu/pack_bits_kernel.h"
#include "cpu/threads/tasks.h"

namespace filbert {

FILBERT_CHOOSE(PackBitsKernel, pack_bits, FILBERT_BIT_COPIES(pack_bits))

void pack_bits_cpu(const PackBitsArgs& args) {
  constexpr int64_t kElementBytes = 2;  // what an element costs
  const PackBitsKernel& kernel = chosen_pack_bits();
  for_rows(args.rows, args.width * kElementBytes,
           [&](int64_t begin, int64_t end) { kernel.rows(args, begin, end); });
}

}  // namespace filbert
