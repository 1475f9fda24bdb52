#include "args/norm_residual.h"

#include "cpu/kernels.h"
#include "torch/common.h"

namespace filbert {
namespace {

constexpr const char* kOp = "norm_residual";

void check_rows(const Tensor& t, const char* name) {
  check(t.dim() == 2 && (t.size(1) < 2 || t.stride(1) == 1), kOp, name, t,
        "[T, N] with contiguous rows", "tensor.flatten(0, -2).contiguous()");
}

NormResidualArgs make_args(const Tensor& x, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, const Tensor& weight,
                           const Tensor& beta, double eps) {
  NormResidualArgs args{};
  args.dtype = dtype_of(x, kOp, "x");
  check_rows(x, "x");
  args.rows = x.size(0);
  args.width = x.size(1);
  args.eps = static_cast<float>(eps);
  if (residual) {
    check_like(*residual, x, kOp, "residual");
    check_rows(*residual, "residual");
    check(residual->size(0) == args.rows && residual->size(1) == args.width, kOp, "residual",
          *residual, "the shape of x", "the residual of the same rows");
    args.residual = residual->const_data_ptr();
    args.residual_row = residual->stride(0);
  }
  args.bias = vector_operand(bias, args.width, x, kOp, "bias");
  args.weight = vector_operand(weight, args.width, x, kOp, "weight");
  args.beta = vector_operand(beta, args.width, x, kOp, "beta");
  args.x = x.const_data_ptr();
  args.x_row = x.stride(0);
  return args;
}

void run(NormResidualArgs& args, Tensor& out) {
  args.out = out.mutable_data_ptr();
  args.out_row = out.stride(0);
  if (args.rows > 0 && args.width > 0) norm_residual_cpu(args);
}

Tensor norm_residual(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual,
                     Tensor weight, Tensor beta, double eps) {
  NormResidualArgs args = make_args(x, bias, residual, weight, beta, eps);
  Tensor out = torch::stable::new_empty(x, {args.rows, args.width});
  run(args, out);
  return out;
}

void norm_residual_(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    Tensor weight, Tensor beta, double eps) {
  NormResidualArgs args = make_args(x, bias, residual, weight, beta, eps);
  check(args.rows < 2 || x.stride(0) >= args.width, "norm_residual_", "x", x,
        "rows that do not overlap, since they are written", "x.contiguous()");
  run(args, x);
}

}  // namespace
}  // namespace filbert

STABLE_TORCH_LIBRARY_IMPL(filbert, CPU, m) {
  m.impl("norm_residual", TORCH_BOX(&filbert::norm_residual));
  m.impl("norm_residual_", TORCH_BOX(&filbert::norm_residual_));
}
