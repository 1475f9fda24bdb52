// Rows times a weight of two factors, a block of rows at a time: what is as wide as the rank stays
// in L2 between the two products. Each is linear_dense's, so the result is to the bit that of two
// calls of it.
#include "args/linear_lowrank.h"

#include "cpu/gemm/deal.h"
#include "cpu/linear_dense_kernel.h"
#include "cpu/lowrank/factor.h"
#include "cpu/norm_residual_kernel.h"

namespace filbert {
namespace {

constexpr int64_t kMostRows = 96;  // of a block

// How many rows a thread has that goes through both products alone. Few do where threads could not
// share the outputs of the first.
int64_t rows_apart(const LinearLowRankArgs& args) {
  const int64_t shares = (args.factors.rank + kDensePanel - 1) / kDensePanel / kSharePanels;
  return shares < thread_count() ? 12 : kRowsApart;
}

LinearDenseArgs to_rank(const LinearLowRankArgs& args) {
  LinearDenseArgs one = factor_product(args.dtype, args.weight_dtype, args.factors.a, args.inputs,
                                       args.inputs, args.factors.rank);
  one.x = args.x;
  one.x_row = args.x_row;
  one.rows = args.rows;
  return one;
}
LinearDenseArgs from_rank(const LinearLowRankArgs& args) {
  LinearDenseArgs one = factor_product(args.dtype, args.weight_dtype, args.factors.b,
                                       args.factors.rank, args.factors.held, args.outputs);
  one.bias = args.factors.bias;
  one.residual = args.residual;
  one.residual_row = args.residual_row;
  one.norm_weight = args.norm_weight;
  one.norm_bias = args.norm_bias;
  one.out = args.out;
  one.rows = args.rows;
  one.activation = args.activation;
  one.eps = args.eps;
  return one;
}

}  // namespace

void linear_lowrank_cpu(const LinearLowRankArgs& args) {
  LinearDenseArgs first = to_rank(args), last = from_rank(args);
  const auto narrow_bytes = [&](int64_t rows) {
    return (rows * args.factors.rank * size_of(args.dtype) + 63) / 64 * 64;
  };
  if (args.rows <
      thread_count() * rows_apart(args)) {  // the threads share the outputs of each product
    thread_local Scratch shared;
    last.x = first.out = shared.at_least(narrow_bytes(args.rows));
    linear_dense_cpu(first);
    linear_dense_cpu(last);
    return shared.trim();
  }
  const LinearDenseKernel& kernel = chosen_linear_dense();
  const NormResidualKernel& layer_norm = chosen_norm_residual();
  const ProductDeal deal(args.rows, 1, args.rows * args.factors.rank * (args.inputs + args.outputs),
                         kMostRows, kernel.tile_rows, rows_apart(args));
  const NormResidualArgs norm = norm_of_output(last);
  const int64_t narrow = narrow_bytes(deal.block_rows);
  int64_t own = args.norm_weight ? layer_norm.scratch(norm) : 0;
  for (const LinearDenseArgs& one : {first, last}) {
    own = std::max(own, kernel.scratch(one, deal.block_rows));
  }
  deal.run(narrow + own, [&](int64_t begin, int64_t end, int64_t, int64_t, void* scratch) {
    char* const rest = static_cast<char*>(scratch) + narrow;
    const auto row = [&](const void* rows, int64_t stride) {
      return const_cast<char*>(static_cast<const char*>(rows)) +
             begin * stride * size_of(args.dtype);
    };
    LinearDenseArgs down = first, up = last;
    down.x = row(args.x, args.x_row);
    up.x = down.out = scratch;
    up.out = row(args.out, args.outputs);
    if (args.residual) up.residual = row(args.residual, args.residual_row);
    kernel.block(down, 0, end - begin, 0, panels_of(down), rest);
    kernel.block(up, 0, end - begin, 0, panels_of(up), rest);
    if (args.norm_weight) layer_norm.rows(norm, begin, end, rest);
  });
}

}  // namespace filbert
