// Deals a dense product out over the threads: blocks of rows, and shares of the outputs where there
// are few rows.
#include "cpu/linear_dense_kernel.h"

#include "cpu/gemm/deal.h"
#include "cpu/norm_residual_kernel.h"

namespace filbert {

FILBERT_CHOOSE(LinearDenseKernel, linear_dense, FILBERT_COPIES(linear_dense))

void linear_dense_cpu(const LinearDenseArgs& args) {
  const LinearDenseKernel& kernel = chosen_linear_dense();
  const ProductDeal deal(args.rows, (args.outputs + kDensePanel - 1) / kDensePanel,
                         args.rows * args.outputs * args.inputs, kernel.rows(args),
                         kernel.tile_rows);
  const NormResidualArgs norm = norm_of_output(args);
  const NormResidualKernel& layer_norm = chosen_norm_residual();
  // LayerNorm follows a block while it is in the cache, in memory that the product is done with.
  const int64_t norm_bytes = args.norm_weight ? layer_norm.scratch(norm) : 0;
  const int64_t bytes = std::max(kernel.scratch(args, deal.block_rows), norm_bytes);
  deal.run(bytes,
           [&](int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end, void* scratch) {
             kernel.block(args, begin, end, panel_begin, panel_end, scratch);
             if (args.norm_weight && deal.shares == 1) layer_norm.rows(norm, begin, end, scratch);
           });
  if (args.norm_weight && deal.shares > 1) norm_residual_cpu(norm);  // a row is whole only now
}

}  // namespace filbert
