// A CPU operator alone, until its kernel for GPUs is there.
#include "args/attn_lowrank.h"

#include <vector>

#include "torch/shared/dense.h"
#include "torch/shared/device.h"
#include "torch/shared/offsets.h"

namespace filbert {
namespace {

constexpr const char* kOp = "attn_lowrank";
constexpr const char* kSides[] = {"query", "key", "value"};

// One of query, key and value: a factor for each head, and columns of the latents that are there.
void check_side(const Tensor& weight, const AttnLowRankArgs& args, int64_t width,
                const HeadFactors& side, const char* name) {
  const auto of = [&](const char* what) { return std::string(what) + " of " + name; };
  check(side.rank >= 1, kOp, of("rank").c_str(), side.rank, "1 or more",
        "the columns of the factor before packing");
  const bool divides = side.groups >= 1 && args.heads % side.groups == 0;
  check(divides, kOp, of("groups").c_str(), side.groups, "a divisor of the number of heads",
        "1, where all heads read the same columns");
  const bool inside = side.begin >= 0 && side.begin + side.groups * side.rank <= width;
  check(inside, kOp, of("first column").c_str(), side.begin,
        "groups * rank columns of latent from there on", "the width of what comes before it");
  const bool pairs = args.weight_dtype == DType::kBFloat16;
  bool ok = weight.dim() == (pairs ? 5 : 4) && weight.size(0) == args.heads &&
            weight.size(1) == (args.dim + kDensePanel - 1) / kDensePanel &&
            side.held >= side.rank && weight.size(3) == kDensePanel && weight.is_contiguous();
  if (pairs) ok = ok && weight.size(4) == 2;
  check(ok, kOp, name, weight, "pack_heads of the [H * D, R] factor", "pack_heads(factor, heads)");
}

Tensor attn_lowrank(Tensor latent, Tensor query, Tensor key, Tensor value, Tensor cu_seqlens,
                    int64_t max_seqlen, int64_t head_dim, std::vector<int64_t> ranks,
                    std::vector<int64_t> begins, std::vector<int64_t> groups, double scale,
                    std::optional<Tensor> bias, std::optional<Tensor> key_bias) {
  AttnLowRankArgs args{};
  args.dtype = dtype_of(latent, kOp, "latent");
  check_rows(latent, kOp, "latent", -1);
  check(head_dim >= 1 && head_dim <= kAttnMaxDim, kOp, "head dimension", head_dim, "1 to 256",
        "more heads of fewer values");
  check(max_seqlen >= 0, kOp, "max_seqlen", max_seqlen, "0 or more",
        "the longest sequence, or 0 if unknown");
  for (const auto& [list, name] :
       {std::pair{&ranks, "ranks"}, {&begins, "begins"}, {&groups, "groups"}}) {
    check(list->size() == 3, kOp, name, list->size(), "three values",
          "one each for query, key and value");
  }
  args.weight_dtype = packed_dtype(query, args.dtype, kOp, "query");
  check(query.dim() >= 1 && query.size(0) >= 1, kOp, "query", query, "at least one head",
        "pack_heads(factor, heads)");
  args.rows = latent.size(0);
  args.heads = query.size(0);
  args.dim = head_dim;
  const Tensor* const weights[] = {&query, &key, &value};
  HeadFactors* const sides[] = {&args.query, &args.key, &args.value};
  for (int s = 0; s < 3; ++s) {
    check_same_device(*weights[s], latent, kOp, kSides[s]);
    check_like(*weights[s], query, kOp, kSides[s]);
    sides[s]->rank = ranks[s];
    sides[s]->begin = begins[s];
    sides[s]->groups = groups[s];
    const int64_t pair = args.weight_dtype == DType::kBFloat16 ? 2 : 1;
    sides[s]->held = weights[s]->dim() >= 3 ? weights[s]->size(2) * pair : 0;
    check_side(*weights[s], args, latent.size(1), *sides[s], kSides[s]);
  }
  check_offset_tensor(kOp, cu_seqlens, latent, "cu_seqlens");
  check_offsets(kOp, cu_seqlens, args.rows, "cu_seqlens");
  const int64_t width = args.heads * args.dim;
  if (bias) check_vector(*bias, 3 * width, latent, kOp, "bias");
  if (key_bias) {
    check_same_device(*key_bias, latent, kOp, "key_bias");
    check(key_bias->scalar_type() == ScalarType::Float, kOp, "dtype of key_bias",
          torch::headeronly::toString(key_bias->scalar_type()), "float32", "tensor.float()");
    check(key_bias->dim() == 1 && key_bias->size(0) == args.rows && key_bias->is_contiguous(), kOp,
          "key_bias", *key_bias, "a contiguous [T]", "one value for each row");
  }
  Tensor out = torch::stable::new_empty(latent, {args.rows, args.heads, args.dim});
  if (args.rows == 0) return out;
  Call call(latent);
  args.latent = call.read(latent);
  args.latent_row = latent.stride(0);
  const char* const biases = bias ? static_cast<const char*>(call.read(*bias)) : nullptr;
  for (int s = 0; s < 3; ++s) {
    sides[s]->weight = call.read(*weights[s]);
    sides[s]->bias = biases ? biases + s * width * size_of(args.dtype) : nullptr;
  }
  args.cu = call.read<int32_t>(cu_seqlens);
  args.sequences = cu_seqlens.size(0) - 1;
  args.key_bias = key_bias ? call.read<float>(*key_bias) : nullptr;
  args.out = call.write(out);
  args.scale = static_cast<float>(scale);
  attn_lowrank_cpu(args);
  call.finish();
  return out;
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("attn_lowrank", TORCH_BOX(&filbert::attn_lowrank)); }
