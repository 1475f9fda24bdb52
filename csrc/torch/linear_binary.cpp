#include "args/linear_binary.h"

#include <tuple>

#include "torch/shared/binary.h"
#include "torch/shared/dtypes.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

// The operands both forms share: rows of codes and the weight.
void read_operands(const Tensor& words, const Tensor& sums, const Tensor& weight,
                   const Tensor& totals, int64_t step, int64_t low, const char* op,
                   LinearBinaryArgs& args) {
  check_type(words, ScalarType::Int, op, "words");
  check(words.dim() == 3 && words.size(0) >= 1 && words.size(0) <= 8, op, "words", words,
        "[P, T, W] with 1 to 8 planes", "the words of pack_bits or pack_codes");
  check(words.size(2) <= kMaxRowWords, op, "words of a row", words.size(2), "at most 2047",
        "fewer input features, at most 65504");
  check(words.size(2) < 2 || words.stride(2) == 1, op, "words", words, "contiguous rows",
        "words.contiguous()");
  check_row_count(words.size(1), op, "rows of words");
  args.planes = static_cast<int32_t>(words.size(0));
  args.rows = words.size(1);
  args.row_words = words.size(2);
  args.plane_stride = words.stride(0);
  args.row_stride = words.stride(1);
  args.outputs = totals.dim() == 1 ? totals.size(0) : -1;
  args.step = static_cast<int32_t>(step);
  args.low = static_cast<int32_t>(low);
  check_vector_of(sums, ScalarType::Int, args.rows, words, op, "sums");
  check_vector_of(totals, ScalarType::Int, args.outputs, words, op, "totals");
  check_same_device(weight, words, op, "weight");
  check_type(weight, ScalarType::Int, op, "weight");
  const bool fits = weight.dim() == 3 && weight.size(2) == kTileOutputs &&
                    weight.size(1) == args.row_words &&
                    weight.size(0) == (args.outputs + kTileOutputs - 1) / kTileOutputs;
  check(fits && weight.is_contiguous(), op, "weight", weight,
        "a contiguous [ceil(N / 16), W, 16] with the W of words and the N of totals",
        "filbert.nn.weight_tiles(bits)");
  check(step == 1 || step == 2, op, "step", step, "1 or 2", "step=2, low=-1 for inputs of +-1");
  check(low >= -16384 && low <= 16384, op, "low", low, "an integer from -16384 to 16384",
        "low=-1 for inputs of +-1");
}

Tensor linear_binary(Tensor words, Tensor sums, Tensor weight, Tensor totals, Tensor alpha,
                     std::optional<Tensor> bias, std::optional<Tensor> scale, int64_t step,
                     int64_t low, std::optional<Tensor> residual, std::optional<Tensor> norm_weight,
                     std::optional<Tensor> norm_bias, double eps, StringHandle dtype_text) {
  const std::string dtype = take_text(dtype_text);
  constexpr const char* kOp = "linear_binary";
  LinearBinaryArgs args{};
  read_operands(words, sums, weight, totals, step, low, kOp, args);
  args.dtype = dtype_named(dtype, kOp);
  args.eps = static_cast<float>(eps);
  const ScalarType type = scalar_type_of(args.dtype);
  check_vector_of(alpha, ScalarType::Float, args.outputs, words, kOp, "alpha");
  if (bias) check_vector_of(*bias, ScalarType::Float, args.outputs, words, kOp, "bias");
  if (scale) check_vector_of(*scale, ScalarType::Float, args.rows, words, kOp, "scale");
  if (residual) {
    check_same_device(*residual, words, kOp, "residual");
    check_type(*residual, type, kOp, "residual");
    check(residual->dim() == 2 && residual->size(0) == args.rows &&
              residual->size(1) == args.outputs && (args.outputs < 2 || residual->stride(1) == 1),
          kOp, "residual", *residual, "[T, N] with contiguous rows", "residual.contiguous()");
    args.residual_row = residual->stride(0);
  }
  check(norm_weight.has_value() == norm_bias.has_value(), kOp, "norm_weight and norm_bias",
        "one of them", "both or none", "zeros for norm_bias");
  if (norm_weight) {
    check_vector_of(*norm_weight, type, args.outputs, words, kOp, "norm_weight");
    check_vector_of(*norm_bias, type, args.outputs, words, kOp, "norm_bias");
  }
  Tensor out = torch::stable::new_empty(words, {args.rows, args.outputs}, type);
  if (args.rows == 0 || args.outputs == 0) return out;
  Call call(words);
  args.words = call.read<uint32_t>(words);
  args.sums = call.read<int32_t>(sums);
  args.weight = call.read<uint32_t>(weight);
  args.totals = call.read<int32_t>(totals);
  args.alpha = call.read<float>(alpha);
  args.bias = bias ? call.read<float>(*bias) : nullptr;
  args.scale = scale ? call.read<float>(*scale) : nullptr;
  args.residual = residual ? call.read(*residual) : nullptr;
  args.norm_weight = norm_weight ? call.read(*norm_weight) : nullptr;
  args.norm_bias = norm_bias ? call.read(*norm_bias) : nullptr;
  args.out = call.write(out);
  FILBERT_RUN(linear_binary, args, call);
  call.finish();
  return out;
}

std::tuple<Tensor, Tensor> linear_binary_bits(Tensor words, Tensor sums, Tensor weight,
                                              Tensor totals, Tensor threshold, int64_t step,
                                              int64_t low, std::optional<Tensor> until,
                                              std::optional<Tensor> lower,
                                              std::optional<Tensor> lower_until) {
  constexpr const char* kOp = "linear_binary_bits";
  LinearBinaryArgs args{};
  read_operands(words, sums, weight, totals, step, low, kOp, args);
  check_vector_of(threshold, ScalarType::Int, args.outputs, words, kOp, "threshold");
  if (until) check_vector_of(*until, ScalarType::Int, args.outputs, words, kOp, "until");
  if (lower) check_vector_of(*lower, ScalarType::Int, args.outputs, words, kOp, "lower");
  if (lower_until) {
    check_vector_of(*lower_until, ScalarType::Int, args.outputs, words, kOp, "lower_until");
  }
  const int64_t planes = planes_out(lower.has_value(), lower_until.has_value());
  Tensor out_words = empty_words(words, planes, args.rows, args.outputs);
  Tensor out_sums = empty_sums(words, args.rows);
  if (args.rows == 0) return {out_words, out_sums};
  if (args.outputs == 0) return {out_words, torch::stable::zero_(out_sums)};
  Call call(words);
  args.words = call.read<uint32_t>(words);
  args.sums = call.read<int32_t>(sums);
  args.weight = call.read<uint32_t>(weight);
  args.totals = call.read<int32_t>(totals);
  args.threshold = call.read<int32_t>(threshold);
  args.until = until ? call.read<int32_t>(*until) : nullptr;
  args.lower = lower ? call.read<int32_t>(*lower) : nullptr;
  args.lower_until = lower_until ? call.read<int32_t>(*lower_until) : nullptr;
  args.out_words = call.write<uint32_t>(out_words);
  args.out_sums = call.write<int32_t>(out_sums);
  FILBERT_RUN(linear_binary, args, call);
  call.finish();
  return {out_words, out_sums};
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) {
  m.impl("linear_binary", TORCH_BOX(&filbert::linear_binary));
  m.impl("linear_binary_bits", TORCH_BOX(&filbert::linear_binary_bits));
}
