// Threads that are none: three ranges, one after the other, so that calls are cut up as they are on
// three.
#include "cpu/threads/parallel.h"

#include <algorithm>

namespace filbert {

int64_t thread_count() { return 3; }

void parallel_ranges(int64_t n, int64_t grain, void* context, RangeBody body) {
  const int64_t parts = std::clamp<int64_t>(n / std::max<int64_t>(grain, 1), 1, thread_count());
  for (int64_t i = 0; i < parts && n > 0; ++i) body(context, i * n / parts, (i + 1) * n / parts);
}

}  // namespace filbert
