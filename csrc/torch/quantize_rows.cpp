#include "args/quantize_rows.h"

#include <tuple>

#include "torch/shared/binary.h"
#include "torch/shared/codes.h"

namespace filbert {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_rows(Tensor x, std::optional<Tensor> scale,
                                                 std::optional<Tensor> zero) {
  constexpr const char* kOp = "quantize_rows";
  QuantizeRowsArgs args{};
  args.dtype = dtype_of(x, kOp, "x");
  check(x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1), kOp, "x", x,
        "[T, K] with contiguous rows", "tensor.flatten(0, -2).contiguous()");
  check_row_count(x.size(0), kOp, "rows of x");
  check(scale.has_value() == zero.has_value(), kOp, "scale and zero",
        scale ? "scale alone" : "zero alone", "both or neither", "zero=torch.tensor([0])");
  if (scale) {
    check_vector_of(*scale, ScalarType::Float, 1, x, kOp, "scale");
    check_vector_of(*zero, ScalarType::Int, 1, x, kOp, "zero");
  }
  args.rows = x.size(0);
  args.width = x.size(1);
  args.x_row = x.stride(0);
  CodeTensors out(x, args.rows, args.width);
  if (args.rows == 0) return {out.codes, out.scale, out.zero};
  Call call(x);
  args.x = call.read(x);
  args.scale = scale ? call.read<float>(*scale) : nullptr;
  args.zero = zero ? call.read<int32_t>(*zero) : nullptr;
  args.out = out.write(call);
  FILBERT_RUN(quantize_rows, args, call);
  call.finish();
  return {out.codes, out.scale, out.zero};
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("quantize_rows", TORCH_BOX(&filbert::quantize_rows)); }
