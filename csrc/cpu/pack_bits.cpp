#include "args/pack_bits.h"

#include <algorithm>

#include "cpu/dispatch/kernels.h"
#include "cpu/threads/parallel.h"

namespace filbert {

void pack_bits_cpu(const PackBitsArgs& args) {
  constexpr int64_t kElementsPerShare = 32768;  // a few microseconds of work
  const BinaryKernels& kernels = cpu_kernels().binary;
  const int64_t grain = std::max<int64_t>(1, kElementsPerShare / std::max<int64_t>(args.width, 1));
  parallel_for(args.rows, grain,
               [&](int64_t begin, int64_t end) { kernels.pack_bits_rows(args, begin, end); });
}

}  // namespace filbert
