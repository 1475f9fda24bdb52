#include "args/norm_residual.h"

#include <tuple>

#include "torch/shared/codes.h"

namespace filbert {
namespace {

void check_rows(const char* op, const Tensor& t, const char* name) {
  check(t.dim() == 2 && (t.size(1) < 2 || t.stride(1) == 1), op, name, t,
        "[T, N] with contiguous rows", "tensor.flatten(0, -2).contiguous()");
}

// LayerNorm(x + bias + residual) into a new tensor, or over x where none is asked for; its codes
// too where they are.
void run_norm(const char* op, const Tensor& x, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const Tensor& weight, const Tensor& beta,
              double eps, Tensor* fresh, CodeTensors* codes = nullptr) {
  NormResidualArgs args{};
  args.dtype = dtype_of(x, op, "x");
  check_rows(op, x, "x");
  args.rows = x.size(0);
  args.width = x.size(1);
  args.eps = static_cast<float>(eps);
  if (residual) {
    check_like(*residual, x, op, "residual");
    check_rows(op, *residual, "residual");
    check(residual->size(0) == args.rows && residual->size(1) == args.width, op, "residual",
          *residual, "the shape of x", "the residual of the same rows");
    args.residual_row = residual->stride(0);
  }
  if (bias) check_vector(*bias, args.width, x, op, "bias");
  check_vector(weight, args.width, x, op, "weight");
  check_vector(beta, args.width, x, op, "beta");
  args.x_row = x.stride(0);
  if (fresh == nullptr) {
    check(args.rows < 2 || x.stride(0) >= args.width, op, "x", x,
          "rows that do not overlap, since they are written", "x.contiguous()");
  } else {
    *fresh = torch::stable::new_empty(x, {args.rows, args.width});
  }
  if (args.rows == 0 || args.width == 0) return;
  Call call(x);
  args.bias = bias ? call.read(*bias) : nullptr;
  args.residual = residual ? call.read(*residual) : nullptr;
  args.weight = call.read(weight);
  args.beta = call.read(beta);
  if (fresh == nullptr) {
    Tensor same = x;
    args.x = args.out = call.update(same);
    args.out_row = args.x_row;
  } else {
    args.x = call.read(x);
    args.out = call.write(*fresh);
    args.out_row = fresh->stride(0);
  }
  if (codes) args.codes = codes->write(call);
  FILBERT_RUN(norm_residual, args, call);
  call.finish();
}

Tensor norm_residual(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual,
                     Tensor weight, Tensor beta, double eps) {
  Tensor out = x;
  run_norm("norm_residual", x, bias, residual, weight, beta, eps, &out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_residual_codes(Tensor x, std::optional<Tensor> bias,
                                                               std::optional<Tensor> residual,
                                                               Tensor weight, Tensor beta,
                                                               double eps) {
  constexpr const char* kOp = "norm_residual_codes";
  check_rows(kOp, x, "x");
  CodeTensors codes(x, x.size(0), x.size(1));
  if (x.size(1) == 0) torch::stable::zero_(codes.scale), torch::stable::zero_(codes.zero);
  Tensor out = x;
  run_norm(kOp, x, bias, residual, weight, beta, eps, &out, &codes);
  return {out, codes.codes, codes.scale, codes.zero};
}

void norm_residual_(Tensor x, std::optional<Tensor> bias, std::optional<Tensor> residual,
                    Tensor weight, Tensor beta, double eps) {
  run_norm("norm_residual_", x, bias, residual, weight, beta, eps, nullptr);
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) {
  m.impl("norm_residual", TORCH_BOX(&filbert::norm_residual));
  m.impl("norm_residual_codes", TORCH_BOX(&filbert::norm_residual_codes));
  m.impl("norm_residual_", TORCH_BOX(&filbert::norm_residual_));
}
