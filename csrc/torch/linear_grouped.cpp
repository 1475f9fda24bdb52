#include "args/linear_grouped.h"

#include <tuple>

#include "torch/shared/activation.h"
#include "torch/shared/binary.h"
#include "torch/shared/capacity.h"
#include "torch/shared/codes.h"
#include "torch/shared/dtypes.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

// The operands of a call as they came.
struct Operands {
  const char* op;
  const Tensor& x;
  const Tensor& weight;
  const Tensor& scale;
  const Tensor& totals;
  const std::optional<Tensor>& x_scale;
  const std::optional<Tensor>& x_zero;
  const std::optional<Tensor>& multiplier;
  const std::optional<Tensor>& offset;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
  const std::optional<Tensor>& norm_weight;
  const std::optional<Tensor>& norm_bias;

  // Memory that a GPU needs between its kernels: codes of numbers, and sums of codes.
  struct Memory {
    std::optional<CodeTensors> codes;
    std::optional<Tensor> code_sums;
  };

  bool coded() const { return x.scalar_type() == ScalarType::Byte; }

  void check_x(LinearGroupedArgs& args, const std::string& dtype) const {
    check(x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1), op, "x", x,
          "[T, K] with contiguous rows", "tensor.flatten(0, -2).contiguous()");
    check_row_count(x.size(0), op, "rows of x");
    args.rows = x.size(0);
    args.inputs = x.size(1);
    check(args.inputs <= 65536, op, "columns of x", args.inputs, "at most 65536",
          "parts of the inputs, and the sum of what they give");
    args.dtype = coded() ? dtype_named(dtype, op) : dtype_of(x, op, "x");
    args.x_row = x.stride(0);
    check(coded() == x_scale.has_value() && coded() == x_zero.has_value(), op, "x_scale and x_zero",
          coded() ? "codes without them" : "numbers with them",
          "both for codes (uint8), none for numbers", "what quantize_rows returned");
    if (coded()) {
      check_vector_of(*x_scale, ScalarType::Float, args.rows, x, op, "x_scale");
      check_vector_of(*x_zero, ScalarType::Int, args.rows, x, op, "x_zero");
    }
  }

  // A tensor [panels, groups, 16].
  void check_groups(const Tensor& t, ScalarType type, const LinearGroupedArgs& args,
                    const char* name) const {
    check_same_device(t, x, op, name);
    check_type(t, type, op, name);
    const int64_t panels = (args.outputs + kGroupedPanel - 1) / kGroupedPanel;
    const bool fits = t.dim() == 3 && t.size(0) == panels && t.size(1) >= 1 &&
                      t.size(2) == kGroupedPanel && t.is_contiguous();
    check(fits, op, name, t, "a contiguous [ceil(N / 16), G, 16]", "pack_groups of the [N, G]");
    check(args.groups == 1 || args.groups == t.size(1), op, "groups of offset", t.size(1),
          "those of multiplier", "offsets of the same groups");
  }

  void check_weight(LinearGroupedArgs& args, int64_t bits) const {
    check(bits == 2 || bits == 3 || bits == 4 || bits == 6 || bits == 8, op, "bits", bits,
          "2, 3, 4, 6 or 8", "bits=4");
    args.bits = static_cast<int32_t>(bits);
    args.outputs = scale.dim() == 1 ? scale.size(0) : -1;
    check_vector_of(scale, ScalarType::Float, args.outputs, x, op, "scale");
    check_vector_of(totals, ScalarType::Int, args.outputs, x, op, "totals");
    check_same_device(weight, x, op, "weight");
    check_type(weight, ScalarType::Byte, op, "weight");
    const int64_t panels = (args.outputs + kGroupedPanel - 1) / kGroupedPanel;
    const int64_t units = (args.inputs + kGroupedUnit - 1) / kGroupedUnit;
    const bool fits = weight.dim() == 3 && weight.size(0) == panels && weight.size(1) == units &&
                      weight.size(2) == bits * kGroupedUnitBytes && weight.is_contiguous();
    if (!fits) {
      std::ostringstream need;
      need << "a contiguous [" << panels << ", " << units << ", " << bits * kGroupedUnitBytes
           << "] for " << args.outputs << " outputs of " << args.inputs << " inputs and " << bits
           << " bits";
      check(false, op, "weight", weight, need.str().c_str(), "pack_grouped of the [N, K] codes");
    }
    args.groups = 1;
    if (multiplier) {
      check_groups(*multiplier, ScalarType::Byte, args, "multiplier");
      args.groups = multiplier->size(1);
    }
    if (offset) {
      if (multiplier) {
        check(offset->dim() == 3 && offset->size(1) == args.groups, op, "groups of offset", *offset,
              "those of multiplier", "offsets of the same groups");
      }
      check_groups(*offset, ScalarType::Int, args, "offset");
      args.groups = offset->size(1);
    }
    const int64_t size = args.inputs / args.groups;
    const bool whole = size * args.groups == args.inputs;
    check(args.groups == 1 || (whole && (size == 32 || size == 64 || size == 128)), op,
          "inputs of a group", args.inputs, "a whole number of groups of 32, 64 or 128 inputs",
          "another group size, or none");
  }

  void check_rest(LinearGroupedArgs& args, const std::string& activation, double eps) const {
    const ScalarType type = scalar_type_of(args.dtype);
    args.activation = activation_of(activation, op);
    args.eps = static_cast<float>(eps);
    if (bias) check_vector_of(*bias, ScalarType::Float, args.outputs, x, op, "bias");
    if (residual) {
      check_same_device(*residual, x, op, "residual");
      check_type(*residual, type, op, "residual");
      check(residual->dim() == 2 && residual->size(0) == args.rows &&
                residual->size(1) == args.outputs && (args.outputs < 2 || residual->stride(1) == 1),
            op, "residual", *residual, "[T, N] with contiguous rows", "residual.contiguous()");
      args.residual_row = residual->stride(0);
    }
    check(norm_weight.has_value() == norm_bias.has_value(), op, "norm_weight and norm_bias",
          "one of them", "both or none", "zeros for norm_bias");
    if (norm_weight) {
      check_vector_of(*norm_weight, type, args.outputs, x, op, "norm_weight");
      check_vector_of(*norm_bias, type, args.outputs, x, op, "norm_bias");
    }
  }

  Memory memory(const LinearGroupedArgs& args) const {
    Memory needed;
    if (!kOnGpu) return needed;
    if (!coded()) needed.codes.emplace(x, args.rows, args.inputs);
    if (offset) {
      needed.code_sums = torch::stable::new_empty(x, {args.rows, args.groups}, ScalarType::Int);
    }
    return needed;
  }

  void read(Call& call, Memory& memory, LinearGroupedArgs& args) const {
    if (memory.codes) args.codes = memory.codes->write(call);
    if (memory.code_sums) args.code_sums = call.write<int32_t>(*memory.code_sums);
    if (coded()) {
      // Operands are only read; the struct is the one of results too.
      args.codes = {const_cast<uint8_t*>(call.read<uint8_t>(x)),
                    const_cast<float*>(call.read<float>(*x_scale)),
                    const_cast<int32_t*>(call.read<int32_t>(*x_zero)), args.x_row};
    } else {
      args.x = call.read(x);
    }
    args.weight = call.read<uint8_t>(weight);
    args.scale = call.read<float>(scale);
    args.totals = call.read<int32_t>(totals);
    args.multiplier = multiplier ? call.read<uint8_t>(*multiplier) : nullptr;
    args.offset = offset ? call.read<int32_t>(*offset) : nullptr;
    args.bias = bias ? call.read<float>(*bias) : nullptr;
    args.residual = residual ? call.read(*residual) : nullptr;
    args.norm_weight = norm_weight ? call.read(*norm_weight) : nullptr;
    args.norm_bias = norm_bias ? call.read(*norm_bias) : nullptr;
  }
};

LinearGroupedArgs args_of(const Operands& all, int64_t bits, const std::string& activation,
                          double eps, const std::string& dtype) {
  LinearGroupedArgs args{};
  all.check_x(args, dtype);
  all.check_weight(args, bits);
  all.check_rest(args, activation, eps);
  return args;
}

Tensor linear_grouped(Tensor x, Tensor weight, Tensor scale, Tensor totals, int64_t bits,
                      std::optional<Tensor> x_scale, std::optional<Tensor> x_zero,
                      std::optional<Tensor> multiplier, std::optional<Tensor> offset,
                      std::optional<Tensor> bias, StringHandle activation_text,
                      std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
                      std::optional<Tensor> norm_bias, double eps, StringHandle dtype_text) {
  const std::string activation = take_text(activation_text), dtype = take_text(dtype_text);
  const Operands all{"linear_grouped", x,      weight, scale,    totals,      x_scale,  x_zero,
                     multiplier,       offset, bias,   residual, norm_weight, norm_bias};
  LinearGroupedArgs args = args_of(all, bits, activation, eps, dtype);
  Tensor out = empty_rows(x, args.rows, args.outputs, scalar_type_of(args.dtype));
  if (args.rows == 0 || args.outputs == 0) return out;
  Operands::Memory memory = all.memory(args);
  Call call(x);
  all.read(call, memory, args);
  args.out = call.write(out);
  FILBERT_RUN(linear_grouped, args, call);
  call.finish();
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_grouped_codes(
    Tensor x, Tensor weight, Tensor scale, Tensor totals, int64_t bits,
    std::optional<Tensor> x_scale, std::optional<Tensor> x_zero, std::optional<Tensor> multiplier,
    std::optional<Tensor> offset, std::optional<Tensor> bias, StringHandle activation_text,
    std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, double eps, StringHandle dtype_text) {
  const std::string activation = take_text(activation_text), dtype = take_text(dtype_text);
  const Operands all{"linear_grouped_codes",
                     x,
                     weight,
                     scale,
                     totals,
                     x_scale,
                     x_zero,
                     multiplier,
                     offset,
                     bias,
                     residual,
                     norm_weight,
                     norm_bias};
  LinearGroupedArgs args = args_of(all, bits, activation, eps, dtype);
  const bool rows = norm_weight.has_value();
  Tensor out = empty_rows(x, rows ? args.rows : 0, args.outputs, scalar_type_of(args.dtype));
  CodeTensors codes(x, args.rows, args.outputs);
  if (args.rows == 0) return {out, codes.codes, codes.scale, codes.zero};
  if (args.outputs == 0) {
    return {out, codes.codes, torch::stable::zero_(codes.scale), torch::stable::zero_(codes.zero)};
  }
  Operands::Memory memory = all.memory(args);
  Call call(x);
  all.read(call, memory, args);
  if (rows) args.out = call.write(out);
  std::optional<Tensor> wide;
  if (kOnGpu && !rows) {
    wide = torch::stable::new_empty(x, {args.rows, args.outputs}, ScalarType::Float);
    args.out = call.write(*wide);
  }
  args.out_codes = codes.write(call);
  FILBERT_RUN(linear_grouped, args, call);
  call.finish();
  return {out, codes.codes, codes.scale, codes.zero};
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) {
  m.impl("linear_grouped", TORCH_BOX(&filbert::linear_grouped));
  m.impl("linear_grouped_codes", TORCH_BOX(&filbert::linear_grouped_codes));
}
