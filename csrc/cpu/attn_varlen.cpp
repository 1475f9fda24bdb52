// Splits attention over a packed batch into tasks and deals them to the pool.
#include <algorithm>
#include <cstring>

#include "cpu/attention/plan.h"
#include "cpu/threads/tasks.h"

namespace filbert {
namespace {

// Rows that no task writes: queries without keys, and rows past the last sequence.
void clear_rows(const AttnVarlenArgs& args, int64_t begin, int64_t end) {
  const int64_t row_bytes = args.dim * size_of(args.dtype);
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t h = 0; h < args.heads; ++h) {
      char* out = static_cast<char*>(args.out) +
                  (r * args.out_row + h * args.out_head) * size_of(args.dtype);
      std::memset(out, 0, row_bytes);
      args.lse[h * args.rows_q + r] = -__builtin_inff();
    }
  }
}

}  // namespace

FILBERT_CHOOSE(AttnVarlenKernel, attn_varlen, FILBERT_COPIES(attn_varlen))

AttnPlan plan_attn_varlen(const AttnVarlenArgs& args, int64_t threads) {
  // As many heads to a task as still leave every thread several tasks, since neighbouring heads
  // share pages and prefetches. Where there are fewer heads than threads could share, the queries
  // of long sequences are split too. Largest first, so that no thread ends alone with a big task.
  constexpr int64_t kTasksPerThread = 8;
  constexpr int64_t kFewestRows =
      64;  // a split packs K and V again, so its rows must be worth that
  const int64_t pairs = std::max<int64_t>(args.sequences * args.heads, 1);
  const int64_t splits_wanted = threads == 1 ? 1 : std::max<int64_t>(1, 2 * threads / pairs);
  AttnPlan plan{};
  plan.heads_per_task = std::clamp<int64_t>(pairs / (kTasksPerThread * threads), 1, args.heads);
  plan.tasks.reserve(pairs / plan.heads_per_task + args.sequences);
  for (int64_t s = 0; s < args.sequences; ++s) {
    const int64_t len_q = args.cu_q[s + 1] - args.cu_q[s];
    const int64_t len_k = args.cu_k[s + 1] - args.cu_k[s];
    if (len_q == 0 || len_k == 0) continue;
    plan.longest_k = std::max(plan.longest_k, len_k);
    plan.multiply_adds += 2 * args.heads * len_q * len_k * args.dim;
    const int64_t splits = std::clamp<int64_t>(len_q / kFewestRows, 1, splits_wanted);
    for (int64_t h = 0; h < args.heads; h += plan.heads_per_task) {
      for (int64_t i = 0; i < splits; ++i) {
        plan.tasks.push_back({static_cast<int32_t>(s), static_cast<int32_t>(h),
                              static_cast<int32_t>(std::min(h + plan.heads_per_task, args.heads)),
                              static_cast<int32_t>(i * len_q / splits),
                              static_cast<int32_t>((i + 1) * len_q / splits)});
      }
    }
  }
  const auto cost = [&](const AttnTask& t) {
    return (t.head_end - t.head_begin) * int64_t{t.q_end - t.q_begin} *
           (args.cu_k[t.sequence + 1] - args.cu_k[t.sequence]);
  };
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                   [&](const AttnTask& a, const AttnTask& b) { return cost(a) > cost(b); });
  plan.scratch_bytes = chosen_attn_varlen().scratch(args, plan.longest_k);
  return plan;
}

void attn_varlen_cpu(const AttnVarlenArgs& args) {
  const AttnVarlenKernel& kernel = chosen_attn_varlen();
  const int64_t threads = thread_count();
  for (int64_t s = 0; s < args.sequences; ++s) {
    if (args.cu_k[s + 1] == args.cu_k[s]) clear_rows(args, args.cu_q[s], args.cu_q[s + 1]);
  }
  clear_rows(args, args.cu_q[args.sequences], args.rows_q);

  const AttnPlan plan = plan_attn_varlen(args, threads);
  for_tasks(static_cast<int64_t>(plan.tasks.size()), threads, plan.scratch_bytes,
            [&](int64_t i, void* scratch) { kernel.task(args, plan.tasks[i], scratch); });
}

}  // namespace filbert
