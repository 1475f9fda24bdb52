#include "args/pack_bits.h"

#include <tuple>

#include "torch/shared/binary.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

void read_rows(const Tensor& x, const char* op, PackBitsArgs& args) {
  args.dtype = dtype_of(x, op, "x");
  check(x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1), op, "x", x,
        "[T, K] with contiguous rows", "tensor.flatten(0, -2).contiguous()");
  check(x.size(1) <= 32 * kMaxRowWords, op, "columns of x", x.size(1), "at most 65504",
        "packing parts of the rows");
  check_row_count(x.size(0), op, "rows of x");
  args.rows = x.size(0);
  args.width = x.size(1);
  args.x_row = x.stride(0);
}

std::tuple<Tensor, Tensor> pack_bits(Tensor x, std::optional<Tensor> threshold,
                                     StringHandle ties_text) {
  const std::string ties = take_text(ties_text);
  constexpr const char* kOp = "pack_bits";
  PackBitsArgs args{};
  read_rows(x, kOp, args);
  args.ties = ties_of(ties, kOp, "ties");
  if (threshold) check_vector_of(*threshold, ScalarType::Float, args.width, x, kOp, "threshold");
  Tensor words = empty_words(x, planes_of(args), args.rows, args.width);
  Tensor sums = empty_sums(x, args.rows);
  if (args.rows == 0) return {words, sums};
  Call call(x);
  args.x = call.read(x);
  args.threshold = threshold ? call.read<float>(*threshold) : nullptr;
  args.words = call.write<uint32_t>(words);
  args.sums = call.write<int32_t>(sums);
  FILBERT_RUN(pack_bits, args, call);
  call.finish();
  return {words, sums};
}

std::tuple<Tensor, Tensor, Tensor> pack_codes(Tensor x, int64_t bits, int64_t low,
                                              std::optional<Tensor> scale) {
  constexpr const char* kOp = "pack_codes";
  PackBitsArgs args{};
  read_rows(x, kOp, args);
  check(bits == 2 || bits == 4 || bits == 8, kOp, "bits", bits, "2, 4 or 8", "bits=8");
  check(low >= -16384 && low <= 16384, kOp, "low", low, "an integer from -16384 to 16384",
        "low=0, or -2**(bits - 1) for signed values");
  args.bits = static_cast<int32_t>(bits);
  args.low = static_cast<int32_t>(low);
  if (scale) check_vector_of(*scale, ScalarType::Float, args.rows, x, kOp, "scale");
  Tensor words = empty_words(x, bits, args.rows, args.width);
  Tensor sums = empty_sums(x, args.rows);
  Tensor used = torch::stable::new_empty(x, {args.rows}, ScalarType::Float);
  if (args.rows == 0) return {words, sums, used};
  Call call(x);
  args.x = call.read(x);
  args.scale = scale ? call.read<float>(*scale) : nullptr;
  args.words = call.write<uint32_t>(words);
  args.sums = call.write<int32_t>(sums);
  args.scale_out = call.write<float>(used);
  FILBERT_RUN(pack_bits, args, call);
  call.finish();
  return {words, sums, used};
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) {
  m.impl("pack_bits", TORCH_BOX(&filbert::pack_bits));
  m.impl("pack_codes", TORCH_BOX(&filbert::pack_codes));
}
