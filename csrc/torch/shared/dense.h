// What operators with weights of pack_dense check.
#pragma once

#include "args/linear_dense.h"
#include "torch/shared/device.h"

namespace filbert {

// The dtype of a weight of pack_dense, which may go with rows of that dtype.
inline DType packed_dtype(const Tensor& weight, DType rows, const char* op, const char* name) {
  const ScalarType type = weight.scalar_type();
  const bool bfloat16 = type == ScalarType::BFloat16;
  const bool ok = rows == DType::kBFloat16
                      ? bfloat16
                      : bfloat16 || type == ScalarType::Float || type == ScalarType::Half;
  check(ok, op, (std::string("dtype of ") + name).c_str(), torch::headeronly::toString(type),
        rows == DType::kBFloat16 ? "bfloat16 for bfloat16 rows"
                                 : "float32, float16 or bfloat16 for float32 rows",
        "pack_dense of a weight of that dtype");
  if (bfloat16) return DType::kBFloat16;
  return type == ScalarType::Half ? DType::kFloat16 : DType::kFloat32;
}

// A weight of pack_dense of [outputs, inputs].
inline void check_packed(const Tensor& weight, DType dtype, int64_t inputs, int64_t outputs,
                         const char* op, const char* name) {
  const bool pairs = dtype == DType::kBFloat16;
  const int64_t panels = (outputs + kDensePanel - 1) / kDensePanel;
  const int64_t steps = pairs ? (inputs + 1) / 2 : inputs;
  bool ok = weight.dim() == (pairs ? 4 : 3) && weight.size(0) == panels &&
            weight.size(1) == steps && weight.size(2) == kDensePanel && weight.is_contiguous();
  if (pairs) ok = ok && weight.size(3) == 2;
  if (ok) return;
  std::ostringstream need;
  need << "a contiguous [" << panels << ", " << steps << ", " << kDensePanel
       << (pairs ? ", 2]" : "]") << " for " << outputs << " outputs of " << inputs << " inputs";
  check(false, op, name, weight, need.str().c_str(), "pack_dense of the [N, K] weight");
}

// Rows of `width` values, or of any if it is negative.
inline void check_rows(const Tensor& t, const char* op, const char* name, int64_t width) {
  const bool ok =
      t.dim() == 2 && (width < 0 || t.size(1) == width) && (t.size(1) < 2 || t.stride(1) == 1);
  check(ok, op, name, t, width < 0 ? "[T, K] with contiguous rows" : "[T, N] with contiguous rows",
        "tensor.flatten(0, -2).contiguous()");
}

// What may follow a product of the rows of x with `outputs` outputs: a residual, and a LayerNorm.
// Gives the residual's stride.
inline int64_t check_follows(const Tensor& x, int64_t outputs,
                             const std::optional<Tensor>& residual,
                             const std::optional<Tensor>& norm_weight,
                             const std::optional<Tensor>& norm_bias, const char* op) {
  if (residual) {
    check_like(*residual, x, op, "residual");
    check_rows(*residual, op, "residual", outputs);
    check(residual->size(0) == x.size(0), op, "rows of residual", *residual, "the rows of x",
          "the residual of the same rows");
  }
  check(norm_weight.has_value() == norm_bias.has_value(), op, "norm_weight and norm_bias",
        norm_weight ? "norm_weight alone" : "norm_bias alone", "both or neither",
        "zeros for a missing norm_bias");
  if (norm_weight) {
    check_vector(*norm_weight, outputs, x, op, "norm_weight");
    check_vector(*norm_bias, outputs, x, op, "norm_bias");
  }
  return residual ? residual->stride(0) : 0;
}

// Their pointers, once they are checked.
template <typename Args>
void read_follows(Call& call, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                  Args& args) {
  args.residual = residual ? call.read(*residual) : nullptr;
  args.norm_weight = norm_weight ? call.read(*norm_weight) : nullptr;
  args.norm_bias = norm_bias ? call.read(*norm_bias) : nullptr;
}

}  // namespace filbert
