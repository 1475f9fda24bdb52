// Splits attention over a packed batch into tasks and deals them to the pool.
#include "args/attn_varlen.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace filbert {
namespace {

// A buffer each thread keeps between calls, so that a layer does not pay page faults for it.
class Scratch {
 public:
  void* at_least(int64_t bytes) {
    if (bytes > size_) {
      data_.reset();  // before the new one, so that both never live at once
      data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return data_.get();
  }

  // Long sequences must not pin their memory to the thread for good.
  void trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = int64_t{4} << 20;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

thread_local Scratch scratch;

struct Costed {
  AttnTask task;
  int64_t cost;
};

// Tasks of some heads of one sequence: as many heads as still leave every thread several tasks,
// since neighbouring heads share pages and prefetches. Where there are fewer heads than threads could
// share, the queries of long sequences are split too. Largest first, so that no thread is left alone
// with a big task at the end.
std::vector<Costed> plan(const AttnVarlenArgs& args, int64_t threads, int64_t& longest_k) {
  constexpr int64_t kTasksPerThread = 8;
  constexpr int64_t kFewestRows = 64;  // a split packs K and V again, so its rows must be worth that
  const int64_t pairs = std::max<int64_t>(args.sequences * args.heads, 1);
  const int64_t group = std::clamp<int64_t>(pairs / (kTasksPerThread * threads), 1, args.heads);
  const int64_t wanted_splits = threads == 1 ? 1 : std::max<int64_t>(1, 2 * threads / pairs);
  std::vector<Costed> tasks;
  tasks.reserve(pairs / group + args.sequences);
  longest_k = 0;
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t len_q = args.cu_q[s + 1] - args.cu_q[s], len_k = args.cu_k[s + 1] - args.cu_k[s];
    if (len_q == 0 || len_k == 0) continue;
    longest_k = std::max(longest_k, len_k);
    const int64_t splits = std::clamp<int64_t>(len_q / kFewestRows, 1, wanted_splits);
    for (int64_t h = 0; h < args.heads; h += group) {
      const int64_t h_end = std::min(h + group, args.heads);
      for (int64_t i = 0; i < splits; ++i) {
        const int64_t begin = i * len_q / splits, end = (i + 1) * len_q / splits;
        tasks.push_back({{static_cast<int32_t>(s), static_cast<int32_t>(h), static_cast<int32_t>(h_end),
                          static_cast<int32_t>(begin), static_cast<int32_t>(end)},
                         (h_end - h) * (end - begin) * len_k});
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Costed& a, const Costed& b) { return a.cost > b.cost; });
  return tasks;
}

// Rows that no task writes: queries without keys, and rows past the last sequence.
void clear_rows(const AttnVarlenArgs& args, int64_t begin, int64_t end) {
  const int64_t row_bytes = args.dim * size_of(args.dtype);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t h = 0; h < args.heads; ++h) {
      char* out = static_cast<char*>(args.out) + (r * args.out_row + h * args.out_head) * size_of(args.dtype);
      std::memset(out, 0, row_bytes);
      args.lse[h * args.rows_q + r] = -__builtin_inff();
    }
  }
}

}  // namespace

void attn_varlen_cpu(const AttnVarlenArgs& args) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t threads = thread_count();
  for (int64_t s = 0; s < args.sequences; ++s) {
    if (args.cu_k[s + 1] == args.cu_k[s]) clear_rows(args, args.cu_q[s], args.cu_q[s + 1]);
  }
  clear_rows(args, args.cu_q[args.sequences], args.rows_q);

  int64_t longest_k = 0;
  const std::vector<Costed> tasks = plan(args, threads, longest_k);
  if (tasks.empty()) return;
  const int64_t bytes = kernels.attn_varlen_scratch(args, longest_k);
  std::atomic<size_t> next{0};
  const int64_t workers = std::min<int64_t>(threads, static_cast<int64_t>(tasks.size()));
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    // The pool may hand one thread several shares; the queue makes that harmless.
    for (int64_t share = begin; share < end; ++share) {
      void* memory = scratch.at_least(bytes);
      for (size_t i = next.fetch_add(1); i < tasks.size(); i = next.fetch_add(1)) {
        kernels.attn_varlen_task(args, tasks[i].task, memory);
      }
    }
    scratch.trim();
  });
}

}  // namespace filbert
