#include "args/bias_gelu.h"

#include "torch/shared/device.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

constexpr const char* kOp = "bias_gelu_";

void bias_gelu_(Tensor x, std::optional<Tensor> bias, StringHandle approximate_text) {
  const std::string approximate = take_text(approximate_text);
  BiasGeluArgs args{};
  args.dtype = dtype_of(x, kOp, "x");
  check(x.dim() == 2 && x.is_contiguous(), kOp, "x", x, "a contiguous [T, N]",
        "tensor.flatten(0, -2).contiguous()");
  check(approximate == "none" || approximate == "tanh", kOp, "approximate", approximate,
        "'none' or 'tanh'", "'none'");
  args.rows = x.size(0);
  args.width = x.size(1);
  if (bias) check_vector(*bias, args.width, x, kOp, "bias");
  if (args.rows == 0 || args.width == 0) return;
  Call call(x);
  args.bias = bias ? call.read(*bias) : nullptr;
  args.tanh = approximate == "tanh";
  args.x = call.update(x);
  FILBERT_RUN(bias_gelu, args, call);
  call.finish();
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("bias_gelu_", TORCH_BOX(&filbert::bias_gelu_)); }
