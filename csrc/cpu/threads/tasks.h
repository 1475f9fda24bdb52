// The two ways in which a call is dealt to the threads: rows of equal cost, and a queue of tasks.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/threads/parallel.h"
#include "cpu/threads/scratch.h"

namespace filbert {

// A share worth waking a thread for, in bytes that stream by: a few microseconds.
constexpr int64_t kShareBytes = 65536;

// Runs body(begin, end) over ranges of rows. A row costs as much as `bytes` bytes that stream by.
template <typename Body>
void for_rows(int64_t rows, int64_t bytes, const Body& body) {
  parallel_for(rows, std::max<int64_t>(1, kShareBytes / std::max<int64_t>(bytes, 1)), body);
}

// The same, as body(begin, end, scratch) with working memory for each thread.
template <typename Body>
void for_rows(int64_t rows, int64_t bytes, int64_t scratch_bytes, const Body& body) {
  for_rows(rows, bytes, [&](int64_t begin, int64_t end) {
    body(begin, end, thread_scratch().at_least(scratch_bytes));
    thread_scratch().trim();
  });
}

// Runs body(task, scratch) for every task. At most `hands` threads take them one by one in their
// order, so tasks may differ in cost: those with most to do come first.
template <typename Body>
void for_tasks(int64_t tasks, int64_t hands, int64_t scratch_bytes, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min(hands, tasks), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) {
      body(task, thread_scratch().at_least(scratch_bytes));
    }
    thread_scratch().trim();
  });
}

}  // namespace filbert
