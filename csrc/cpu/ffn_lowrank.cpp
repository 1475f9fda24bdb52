// A feed-forward part of four low-rank factors, a block of rows at a time. What is as wide as the
// inner dimension exists only as kBlockSteps columns of one block:
//
//   for block of rows                   of each thread; all of this lies in L2
//     p = x A_up                        as wide as the rank
//     for columns of the inner width    as many as linear_dense has inner steps in a chain
//       t = act(p B_up + bias)
//       s += t A_down                   as wide as the rank; sums stay float32
//     out = s B_down + bias             residual, LayerNorm
//
// Every product is a piece of linear_dense's, and s is added up in its order. So the result is to
// the bit what four calls of linear_dense give, and nothing is computed twice.
#include "args/ffn_lowrank.h"

#include "cpu/gemm/deal.h"
#include "cpu/linear_dense_kernel.h"
#include "cpu/lowrank/factor.h"
#include "cpu/norm_residual_kernel.h"

namespace filbert {
namespace {

constexpr int64_t kMostRows = 96;  // of a block
// How many rows a thread has that goes through all four products alone. Few do where threads could
// hardly share the outputs of the products to the ranks.
int64_t rows_apart(const FfnLowRankArgs& args) {
  const int64_t rank = std::min(args.up.rank, args.down.rank);
  const int64_t shares = (rank + kDensePanel - 1) / kDensePanel / kSharePanels;
  return shares <= thread_count() ? 12 : kRowsApart;
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The four products, without what they read and write.
LinearDenseArgs product(const FfnLowRankArgs& args, const void* weight, int64_t inputs,
                        int64_t held, int64_t outputs) {
  return factor_product(args.dtype, args.weight_dtype, weight, inputs, held, outputs);
}
LinearDenseArgs to_rank(const FfnLowRankArgs& args) {
  LinearDenseArgs one = product(args, args.up.a, args.inputs, args.inputs, args.up.rank);
  one.x = args.x;
  one.x_row = args.x_row;
  return one;
}
LinearDenseArgs to_inner(const FfnLowRankArgs& args) {
  LinearDenseArgs one = product(args, args.up.b, args.up.rank, args.up.held, args.inner);
  one.bias = args.up.bias;
  one.activation = args.activation;
  if (!args.up.a) {
    one.x = args.x;
    one.x_row = args.x_row;
  }
  return one;
}
LinearDenseArgs from_inner(const FfnLowRankArgs& args) {
  return product(args, args.down.a, args.inner, args.inner, args.down.rank);
}
LinearDenseArgs from_rank(const FfnLowRankArgs& args) {
  LinearDenseArgs one = product(args, args.down.b, args.down.rank, args.down.held, args.outputs);
  one.bias = args.down.bias;
  one.residual = args.residual;
  one.residual_row = args.residual_row;
  one.norm_weight = args.norm_weight;
  one.norm_bias = args.norm_bias;
  one.out = args.out;
  one.eps = args.eps;
  return one;
}
// Where down has no second factor its sums are results, and what follows them follows here.
LinearDenseArgs sums_to_results(const FfnLowRankArgs& args) {
  LinearDenseArgs one = from_rank(args);
  one.weight = args.down.a;
  one.x_row = one.inputs = one.weight_inputs = args.inner;
  return one;
}

// Columns [begin, begin + count) of the inner width, of a weight that makes them.
LinearDenseArgs columns_of(LinearDenseArgs one, int64_t begin, int64_t count) {
  const int64_t steps = packed_steps(one.weight_dtype, one.weight_inputs);
  one.weight = static_cast<const char*>(one.weight) + begin * steps * size_of(one.weight_dtype);
  if (one.bias) one.bias = static_cast<const char*>(one.bias) + begin * size_of(one.dtype);
  one.outputs = count;
  return one;
}
// The same of a weight that takes them.
LinearDenseArgs steps_of(LinearDenseArgs one, int64_t begin, int64_t count) {
  one.weight =
      static_cast<const char*>(one.weight) + begin * kDensePanel * size_of(one.weight_dtype);
  one.x_row = one.inputs = count;
  return one;
}

// Bytes of what a block of rows needs beside the products' own working memory.
struct BlockMemory {
  int64_t narrow, wide, sums;  // rows of a rank, rows of columns, float32 sums

  BlockMemory(const FfnLowRankArgs& args, int64_t rows, int64_t columns)
      : narrow(round_up(rows * std::max(args.up.rank, args.down.rank) * size_of(args.dtype), 64)),
        wide(round_up(rows * columns * size_of(args.dtype), 64)),
        sums(round_up(rows * round_up(args.down.rank, kDensePanel) * 4, 64)) {}
  int64_t bytes() const { return narrow + wide + sums; }
};

// Few rows: their inner width is small, and the threads share the outputs of each product.
void one_after_the_other(const FfnLowRankArgs& args) {
  thread_local Scratch shared;
  const BlockMemory memory(args, args.rows, args.inner);
  char* const narrow = static_cast<char*>(shared.at_least(memory.bytes()));
  char* const wide = narrow + memory.narrow;
  LinearDenseArgs first = to_rank(args), second = to_inner(args);
  LinearDenseArgs third = args.down.b ? from_inner(args) : sums_to_results(args);
  LinearDenseArgs last = from_rank(args);
  first.rows = second.rows = third.rows = last.rows = args.rows;
  first.out = narrow;
  if (args.up.a) second.x = narrow;
  third.x = second.out = wide;
  if (args.up.a) linear_dense_cpu(first);
  linear_dense_cpu(second);
  if (args.down.b) last.x = third.out = narrow;
  linear_dense_cpu(third);
  if (args.down.b) linear_dense_cpu(last);
  shared.trim();
}

}  // namespace

void ffn_lowrank_cpu(const FfnLowRankArgs& args) {
  if (args.rows < thread_count() * rows_apart(args)) return one_after_the_other(args);
  const LinearDenseKernel& kernel = chosen_linear_dense();
  const NormResidualKernel& layer_norm = chosen_norm_residual();
  const int64_t columns = kernel.block_steps;
  const int64_t work = args.rows * (args.up.rank * (args.inputs + args.inner) +
                                    args.down.rank * (args.inner + args.outputs));
  const ProductDeal deal(args.rows, 1, work, kMostRows, kernel.tile_rows, rows_apart(args));
  const LinearDenseArgs first = to_rank(args), last = from_rank(args);
  const NormResidualArgs norm = norm_of_output(last);
  const BlockMemory memory(args, deal.block_rows, columns);
  int64_t own = args.norm_weight ? layer_norm.scratch(norm) : 0;
  for (const LinearDenseArgs& one : {first, columns_of(to_inner(args), 0, columns),
                                     steps_of(from_inner(args), 0, columns), last}) {
    own = std::max(own, kernel.scratch(one, deal.block_rows));
  }
  own = round_up(own, 64);
  const auto run = [&](int64_t begin, int64_t end, int64_t, int64_t, void* scratch) {
    char* const narrow = static_cast<char*>(scratch) + own;
    char* const wide = narrow + memory.narrow;
    float* const sums = reinterpret_cast<float*>(wide + memory.wide);
    const int64_t count = end - begin;
    const auto all_of = [&](const LinearDenseArgs& one) {
      kernel.block(one, 0, count, 0, panels_of(one), scratch);
    };
    LinearDenseArgs one = first;
    one.x = static_cast<const char*>(args.x) + begin * args.x_row * size_of(args.dtype);
    one.out = narrow;
    const void* const ranks = args.up.a ? narrow : one.x;
    if (args.up.a) all_of(one);
    for (int64_t column = 0; column < args.inner; column += columns) {
      const int64_t taken = std::min(columns, args.inner - column);
      one = columns_of(to_inner(args), column, taken);
      one.x = ranks;
      one.out = wide;
      all_of(one);
      one = steps_of(from_inner(args), column, taken);
      one.x = wide;
      kernel.add(one, count, column == 0, sums, scratch);
    }
    const auto row = [&](const void* rows, int64_t stride) {
      return const_cast<char*>(static_cast<const char*>(rows)) +
             begin * stride * size_of(args.dtype);
    };
    if (args.down.b) {
      one = from_inner(args);
      one.out = narrow;
      kernel.store(one, count, sums);
    }
    one = args.down.b ? last : sums_to_results(args);
    one.x = narrow;
    one.out = row(args.out, args.outputs);
    if (args.residual) one.residual = row(args.residual, args.residual_row);
    args.down.b ? all_of(one) : kernel.store(one, count, sums);
    if (args.norm_weight) layer_norm.rows(norm, begin, end, scratch);
  };
  deal.run(own + memory.bytes(), run);
}

}  // namespace filbert
