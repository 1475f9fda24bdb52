#include "args/ffn_lowrank.h"

#include <algorithm>
#include <utility>

#include "torch/shared/activation.h"
#include "torch/shared/capacity.h"
#include "torch/shared/dense.h"
#include "torch/shared/device.h"
#include "torch/shared/factors.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

constexpr const char* kOp = "ffn_lowrank";

void check_size(int64_t size, const char* name) {
  check(size >= 1, kOp, name, size, "1 or more", "the size of the factors before packing");
}

Tensor ffn_lowrank(Tensor x, std::optional<Tensor> up_a, Tensor up_b, std::optional<Tensor> up_bias,
                   Tensor down_a, std::optional<Tensor> down_b, std::optional<Tensor> down_bias,
                   int64_t up_rank, int64_t inner, int64_t down_rank, int64_t outputs,
                   StringHandle activation_text, std::optional<Tensor> residual,
                   std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps) {
  const std::string activation = take_text(activation_text);
  FfnLowRankArgs args{};
  args.dtype = dtype_of(x, kOp, "x");
  check_rows(x, kOp, "x", -1);
  check_size(up_rank, "up_rank");
  check_size(inner, "inner");
  check_size(down_rank, "down_rank");
  check_size(outputs, "outputs");
  args.rows = x.size(0);
  args.inputs = x.size(1);
  args.inner = inner;
  args.outputs = outputs;
  args.up.rank = up_rank;
  args.down.rank = down_rank;
  check(up_a || up_rank == args.inputs, kOp, "up_rank without up_a", up_rank, "the inputs of x",
        "up_rank=x.shape[1]");
  check(down_b || down_rank == outputs, kOp, "down_rank without down_b", down_rank, "outputs",
        "down_rank=outputs");
  if (kOnGpu) {
    check_for_gpu(kOp, args.dtype,
                  {{args.inputs, "inputs"}, {inner, "inner"}, {outputs, "outputs"}},
                  std::max(up_rank, down_rank), x);
    check(up_a && down_b, kOp, "factors", "an identity", "all four of them on a GPU",
          "pad_factor(torch.eye(rank))");
    check_like(up_b, x, kOp, "up_b");
    args.weight_dtype = args.dtype;
  } else {
    args.weight_dtype = packed_dtype(up_b, args.dtype, kOp, "up_b");
  }
  args.up.held = up_a ? held_of(up_b, args.weight_dtype, up_rank) : up_rank;
  args.down.held = down_b ? held_of(*down_b, args.weight_dtype, down_rank) : down_rank;
  const struct {
    const Tensor* weight;
    const char* name;
    int64_t inputs, outputs;
  } factors[] = {{up_a ? &*up_a : nullptr, "up_a", args.inputs, args.up.held},
                 {&up_b, "up_b", args.up.held, inner},
                 {&down_a, "down_a", inner, args.down.held},
                 {down_b ? &*down_b : nullptr, "down_b", args.down.held, outputs}};
  for (const auto& factor : factors) {
    if (!factor.weight) continue;
    const Tensor& weight = *factor.weight;
    check_same_device(weight, x, kOp, factor.name);
    check(weight.scalar_type() == up_b.scalar_type(), kOp,
          (std::string("dtype of ") + factor.name).c_str(),
          torch::headeronly::toString(weight.scalar_type()), "that of up_b",
          "one dtype for all factors");
    kOnGpu
        ? check_padded(weight, factor.outputs, factor.inputs, kOp, factor.name)
        : check_packed(weight, args.weight_dtype, factor.inputs, factor.outputs, kOp, factor.name);
  }
  if (up_bias) check_vector(*up_bias, inner, x, kOp, "up_bias");
  if (down_bias) check_vector(*down_bias, outputs, x, kOp, "down_bias");
  args.activation = activation_of(activation, kOp);
  args.residual_row = check_follows(x, outputs, residual, norm_weight, norm_bias, kOp);
  args.eps = static_cast<float>(eps);
  args.x_row = x.stride(0);
  Tensor out = empty_rows(x, args.rows, outputs, x.scalar_type());
  if (args.rows == 0) return out;
  std::optional<Tensor> partial;
#if defined(FILBERT_CUDA) || defined(FILBERT_HOSTCUDA)
  if (const int64_t values = ffn_lowrank_partial_values(args)) {
    partial = torch::stable::new_empty(x, {values}, ScalarType::Float);
  }
#endif
  Call call(x);
  args.x = call.read(x);
  args.up.a = up_a ? call.read(*up_a) : nullptr;
  args.up.b = call.read(up_b);
  args.up.bias = up_bias ? call.read(*up_bias) : nullptr;
  args.down.a = call.read(down_a);
  args.down.b = down_b ? call.read(*down_b) : nullptr;
  args.down.bias = down_bias ? call.read(*down_bias) : nullptr;
  read_follows(call, residual, norm_weight, norm_bias, args);
  args.out = call.write(out);
  if (partial) args.partial = call.write<float>(*partial);
  FILBERT_RUN(ffn_lowrank, args, call);
  call.finish();
  return out;
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("ffn_lowrank", TORCH_BOX(&filbert::ffn_lowrank)); }
