// Attention over latents. A task rebuilds query, key and value of one head of one sequence,
// attends, and forgets them: they never exist for more than a head of a sequence on each thread.
//
//   latent [T, L]    head h of sequence s     q, k, v [len, D]           out
//   |------|         its rank columns   -->   in the thread's memory --> rows of s, columns of h
//   |  s   |         times [R, D]             linear_dense's blocks      attn_varlen's task
//   |------|
//
// Where there are so few heads and sequences that the queries of one are shared by threads, each
// would rebuild all keys and values. They are rebuilt for all first, then.
//
// Products and attention are linear_dense's and attn_varlen's own, so the result is to the bit that
// of calling one after the other.
#include "args/attn_lowrank.h"

#include <cstring>

#include "cpu/attention/plan.h"
#include "cpu/linear_dense_kernel.h"
#include "cpu/lowrank/factor.h"
#include "cpu/threads/tasks.h"

namespace filbert {
namespace {

constexpr int kSides = 3;  // query, key and value

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of one head of one side, from those of the latents.
struct Rebuild {
  const AttnLowRankArgs& args;
  const LinearDenseKernel& kernel = chosen_linear_dense();

  const HeadFactors& side(int index) const {
    return index == 0 ? args.query : index == 1 ? args.key : args.value;
  }

  LinearDenseArgs product(int index, int64_t head) const {
    const HeadFactors& of = side(index);
    const int64_t panels = round_up(args.dim, kDensePanel);
    const int64_t head_bytes =
        panels * packed_steps(args.weight_dtype, of.held) * size_of(args.weight_dtype);
    LinearDenseArgs one = factor_product(args.dtype, args.weight_dtype,
                                         static_cast<const char*>(of.weight) + head * head_bytes,
                                         of.rank, of.held, args.dim);
    const int64_t column = of.begin + head / (args.heads / of.groups) * of.rank;
    one.x = static_cast<const char*>(args.latent) + column * size_of(args.dtype);
    one.x_row = args.latent_row;
    one.rows = args.rows;
    if (of.bias) {
      one.bias = static_cast<const char*>(of.bias) + head * args.dim * size_of(args.dtype);
    }
    return one;
  }

  int64_t block_rows() const {
    int64_t most = kernel.rows(product(0, 0));
    for (int s = 1; s < kSides; ++s) most = std::min(most, kernel.rows(product(s, 0)));
    return most;
  }
  int64_t scratch() const {
    int64_t bytes = 0;
    for (int s = 0; s < kSides; ++s) {
      bytes = std::max(bytes, kernel.scratch(product(s, 0), block_rows()));
    }
    return round_up(bytes, 64);
  }

  // Rows [begin, end) to `out`, which is of row `begin`. There are block_rows() at most.
  void operator()(LinearDenseArgs one, int64_t begin, int64_t end, void* out, void* scratch) const {
    one.x = static_cast<const char*>(one.x) + begin * one.x_row * size_of(args.dtype);
    one.out = out;
    kernel.block(one, 0, end - begin, 0, panels_of(one), scratch);
  }
};

// The attention that follows, without q, k and v.
AttnVarlenArgs attention(const AttnLowRankArgs& args) {
  AttnVarlenArgs one{};
  one.dtype = args.dtype;
  one.cu_q = one.cu_k = args.cu;
  one.key_bias = args.key_bias;
  one.q_row = one.k_row = one.v_row = args.dim;
  one.out = args.out;
  one.out_row = args.heads * args.dim;
  one.out_head = args.dim;
  one.rows_q = one.rows_k = args.rows;
  one.sequences = args.sequences;
  one.self_attention = true;
  one.heads = args.heads;
  one.dim = args.dim;
  one.window_left = one.window_right = -1;
  one.scale = args.scale;
  return one;
}

void all_at_first(const AttnLowRankArgs& args) {
  const Rebuild rebuild{args};
  const int64_t rows = std::max<int64_t>(args.cu[args.sequences], 1), block = rebuild.block_rows();
  const int64_t blocks = (rows + block - 1) / block, bytes = rows * args.dim * size_of(args.dtype);
  const int64_t side = round_up(args.heads * bytes, 64);
  thread_local Scratch shared;
  char* const base =
      static_cast<char*>(shared.at_least(kSides * side + args.heads * args.rows * 4));
  for_tasks(kSides * args.heads * blocks, thread_count(), rebuild.scratch(),
            [&](int64_t task, void* scratch) {
              const int64_t part = task / blocks, s = part / args.heads, head = part % args.heads;
              const int64_t begin = task % blocks * block, end = std::min(begin + block, rows);
              char* const out = base + s * side + head * bytes;
              rebuild(rebuild.product(static_cast<int>(s), head), begin, end,
                      out + begin * args.dim * size_of(args.dtype), scratch);
            });
  AttnVarlenArgs follows = attention(args);
  follows.q = base;
  follows.k = base + side;
  follows.v = base + 2 * side;
  follows.q_head = follows.k_head = follows.v_head = rows * args.dim;
  follows.lse = reinterpret_cast<float*>(base + kSides * side);
  attn_varlen_cpu(follows);
  shared.trim();
}

}  // namespace

void attn_lowrank_cpu(const AttnLowRankArgs& args) {
  const AttnVarlenArgs whole = attention(args);
  const AttnPlan plan = plan_attn_varlen(whole, thread_count());
  for (const AttnTask& task : plan.tasks) {
    if (task.q_begin > 0) return all_at_first(args);
  }
  const int64_t size = size_of(args.dtype), end_row = args.cu[args.sequences];
  std::memset(static_cast<char*>(args.out) + end_row * whole.out_row * size, 0,
              (args.rows - end_row) * whole.out_row * size);
  const Rebuild rebuild{args};
  const AttnVarlenKernel& kernel = chosen_attn_varlen();
  const int64_t block = rebuild.block_rows(), own = rebuild.scratch();
  const int64_t side = round_up(plan.longest_k * args.dim * size, 64);
  const int64_t sums = round_up(plan.longest_k * 4, 64);
  const auto run = [&](int64_t index, void* scratch) {
    const AttnTask& task = plan.tasks[index];
    const int64_t first = args.cu[task.sequence], length = args.cu[task.sequence + 1] - first;
    const int32_t cu[] = {0, static_cast<int32_t>(length)};
    char* const made = static_cast<char*>(scratch);
    char* const rest = made + kSides * side + sums;  // one after the other both use it
    AttnVarlenArgs one = whole;
    one.cu_q = one.cu_k = cu;
    one.sequences = one.heads = 1;
    one.rows_q = one.rows_k = length;
    one.q = made;
    one.k = made + side;
    one.v = made + 2 * side;
    one.lse = reinterpret_cast<float*>(made + kSides * side);
    if (args.key_bias) one.key_bias = args.key_bias + first;
    for (int64_t head = task.head_begin; head < task.head_end; ++head) {
      const LinearDenseArgs products[] = {rebuild.product(0, head), rebuild.product(1, head),
                                          rebuild.product(2, head)};
      for (int64_t begin = 0; begin < length; begin += block) {
        const int64_t end = std::min(begin + block, length);
        for (int s = 0; s < kSides; ++s) {
          rebuild(products[s], first + begin, first + end,
                  made + s * side + begin * args.dim * size, rest);
        }
      }
      one.out = static_cast<char*>(args.out) + (first * whole.out_row + head * args.dim) * size;
      kernel.task(one, {0, 0, 1, 0, static_cast<int32_t>(length)}, rest);
    }
  };
  for_tasks(static_cast<int64_t>(plan.tasks.size()), thread_count(),
            kSides * side + sums + std::max(own, plan.scratch_bytes), run);
}

}  // namespace filbert
