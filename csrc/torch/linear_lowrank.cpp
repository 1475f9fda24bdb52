#include "args/linear_lowrank.h"

#include "torch/shared/activation.h"
#include "torch/shared/capacity.h"
#include "torch/shared/dense.h"
#include "torch/shared/device.h"
#include "torch/shared/factors.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

constexpr const char* kOp = "linear_lowrank";

Tensor linear_lowrank(Tensor x, Tensor a, Tensor b, int64_t rank, int64_t outputs,
                      std::optional<Tensor> bias, StringHandle activation_text,
                      std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
                      std::optional<Tensor> norm_bias, double eps) {
  const std::string activation = take_text(activation_text);
  LinearLowRankArgs args{};
  args.dtype = dtype_of(x, kOp, "x");
  check_rows(x, kOp, "x", -1);
  check(rank >= 1, kOp, "rank", rank, "1 or more", "the rows of A before packing");
  check(outputs >= 1, kOp, "outputs", outputs, "1 or more", "the rows of B before packing");
  args.rows = x.size(0);
  args.inputs = x.size(1);
  args.outputs = outputs;
  args.factors.rank = rank;
  check_same_device(a, x, kOp, "a");
  check_like(b, a, kOp, "b");
  if (kOnGpu) {
    check_for_gpu(kOp, args.dtype, {{args.inputs, "inputs"}, {outputs, "outputs"}}, rank, x);
    check_like(a, x, kOp, "a");
    args.weight_dtype = args.dtype;
  } else {
    args.weight_dtype = packed_dtype(a, args.dtype, kOp, "a");
  }
  const int64_t held = args.factors.held = held_of(b, args.weight_dtype, rank);
  if (kOnGpu) {
    check_padded(a, held, args.inputs, kOp, "a");
    check_padded(b, outputs, held, kOp, "b");
  } else {
    check_packed(a, args.weight_dtype, args.inputs, held, kOp, "a");
    check_packed(b, args.weight_dtype, held, outputs, kOp, "b");
  }
  if (bias) check_vector(*bias, outputs, x, kOp, "bias");
  args.activation = activation_of(activation, kOp);
  args.residual_row = check_follows(x, outputs, residual, norm_weight, norm_bias, kOp);
  args.eps = static_cast<float>(eps);
  args.x_row = x.stride(0);
  Tensor out = empty_rows(x, args.rows, outputs, x.scalar_type());
  if (args.rows == 0) return out;
  Call call(x);
  args.x = call.read(x);
  args.factors.a = call.read(a);
  args.factors.b = call.read(b);
  args.factors.bias = bias ? call.read(*bias) : nullptr;
  read_follows(call, residual, norm_weight, norm_bias, args);
  args.out = call.write(out);
  FILBERT_RUN(linear_lowrank, args, call);
  call.finish();
  return out;
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("linear_lowrank", TORCH_BOX(&filbert::linear_lowrank)); }
