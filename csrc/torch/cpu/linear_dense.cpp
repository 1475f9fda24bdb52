// A CPU operator alone: on CUDA dense products are cuBLASLt's.
#include "args/linear_dense.h"

#include "torch/shared/activation.h"
#include "torch/shared/capacity.h"
#include "torch/shared/dense.h"
#include "torch/shared/device.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

constexpr const char* kOp = "linear_dense";

Tensor linear_dense(Tensor x, Tensor weight, int64_t outputs, std::optional<Tensor> bias,
                    StringHandle activation_text, std::optional<Tensor> residual,
                    std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                    double eps) {
  const std::string activation = take_text(activation_text);
  LinearDenseArgs args{};
  args.dtype = dtype_of(x, kOp, "x");
  check_rows(x, kOp, "x", -1);
  check_same_device(weight, x, kOp, "weight");
  args.weight_dtype = packed_dtype(weight, args.dtype, kOp, "weight");
  check(outputs >= 0, kOp, "outputs", outputs, "0 or more", "the N of the [N, K] weight");
  args.rows = x.size(0);
  args.inputs = args.weight_inputs = x.size(1);
  args.outputs = outputs;
  check_packed(weight, args.weight_dtype, args.inputs, outputs, kOp, "weight");
  if (bias) check_vector(*bias, outputs, x, kOp, "bias");
  args.activation = activation_of(activation, kOp);
  args.residual_row = check_follows(x, outputs, residual, norm_weight, norm_bias, kOp);
  args.eps = static_cast<float>(eps);
  args.x_row = x.stride(0);
  Tensor out = empty_rows(x, args.rows, outputs, x.scalar_type());
  if (args.rows == 0 || outputs == 0) return out;
  Call call(x);
  args.x = call.read(x);
  args.weight = call.read(weight);
  args.bias = bias ? call.read(*bias) : nullptr;
  read_follows(call, residual, norm_weight, norm_bias, args);
  args.out = call.write(out);
  linear_dense_cpu(args);
  call.finish();
  return out;
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("linear_dense", TORCH_BOX(&filbert::linear_dense)); }
