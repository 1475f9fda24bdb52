// Work split over threads, without naming whose threads they are: the binding supplies the pool.
#pragma once

#include <cstdint>

namespace filbert {

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

int64_t thread_count();

// Runs body over disjoint ranges that cover [0, n), each of at least `grain` where possible.
void parallel_ranges(int64_t n, int64_t grain, void* context, RangeBody body);

template <typename Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  parallel_ranges(n, grain, const_cast<Body*>(&body),
                  [](void* context, int64_t begin, int64_t end) {
                    (*static_cast<const Body*>(context))(begin, end);
                  });
}

}  // namespace filbert
