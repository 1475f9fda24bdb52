#include "args/bias_gelu.h"

#include "cpu/kernels.h"
#include "torch/common.h"

namespace filbert {
namespace {

constexpr const char* kOp = "bias_gelu_";

void bias_gelu_(Tensor x, std::optional<Tensor> bias, std::string approximate) {
  BiasGeluArgs args{};
  args.dtype = dtype_of(x, kOp, "x");
  check(x.dim() == 2 && x.is_contiguous(), kOp, "x", x, "a contiguous [T, N]",
        "tensor.flatten(0, -2).contiguous()");
  check(approximate == "none" || approximate == "tanh", kOp, "approximate", approximate,
        "'none' or 'tanh'", "'none'");
  args.rows = x.size(0);
  args.width = x.size(1);
  args.bias = vector_operand(bias, args.width, x, kOp, "bias");
  args.tanh = approximate == "tanh";
  args.x = x.mutable_data_ptr();
  if (args.rows > 0 && args.width > 0) bias_gelu_cpu(args);
}

}  // namespace
}  // namespace filbert

STABLE_TORCH_LIBRARY_IMPL(filbert, CPU, m) {
  m.impl("bias_gelu_", TORCH_BOX(&filbert::bias_gelu_));
}
