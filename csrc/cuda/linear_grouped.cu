// Which kernels a call of linear_grouped runs, and what goes before and after them: rows to codes,
// LayerNorm, codes of the results.
#include "cuda/linear_grouped/code_sums.cuh"

#include "args/norm_residual.h"
#include "cuda/device/launch.cuh"
#include "cuda/linear_grouped_plan.h"

namespace filbert {
namespace cuda {

#define FILBERT_GROUPED_BITS(body) body(2) body(3) body(4) body(6) body(8)
#define FILBERT_DECLARE(bits) \
  void multiply_grouped_##bits(const LinearGroupedArgs&, const LinearGroupedPlan&, Stream);
FILBERT_GROUPED_BITS(FILBERT_DECLARE)
#undef FILBERT_DECLARE

namespace {

void multiply(const LinearGroupedArgs& args, Stream stream) {
  const LinearGroupedPlan plan = plan_linear_grouped(args, multiprocessors());
  if (plan.quantizes) {
    QuantizeRowsArgs quantize{};
    quantize.dtype = args.dtype;
    quantize.x = args.x;
    quantize.x_row = args.x_row;
    quantize.rows = args.rows;
    quantize.width = args.inputs;
    quantize.out = args.codes;
    quantize_rows_cuda(quantize, stream);
  }
  if (args.offset) {
    launch("linear_grouped (code sums)", linear_grouped_code_sums_kernel,
           plan_strided(args.rows, kCodeSumWarps, 32 * kCodeSumWarps, multiprocessors()), stream,
           args);
  }
  switch (args.bits) {
#define FILBERT_CASE(bits) \
  case bits:               \
    return multiply_grouped_##bits(args, plan, stream);
    FILBERT_GROUPED_BITS(FILBERT_CASE)
#undef FILBERT_CASE
  }
}

}  // namespace
}  // namespace cuda

void linear_grouped_cuda(const LinearGroupedArgs& args, void* stream) {
  cuda::multiply(args, stream);
  if (args.norm_weight) {
    NormResidualArgs norm = norm_of_output(args);
    norm.codes = args.out_codes;
    norm_residual_cuda(norm, stream);
  } else if (args.out_codes.codes) {
    QuantizeRowsArgs quantize{};
    quantize.dtype = DType::kFloat32;
    quantize.x = args.out;
    quantize.x_row = quantize.width = args.outputs;
    quantize.rows = args.rows;
    quantize.out = args.out_codes;
    quantize_rows_cuda(quantize, stream);
  }
}

}  // namespace filbert
