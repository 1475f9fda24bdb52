#include "args/attn_varlen.h"

#include <algorithm>
#include <tuple>

#include "cpu/kernels.h"
#include "torch/common.h"

namespace filbert {
namespace {

constexpr const char* kOp = "attn_varlen";
constexpr int64_t kMaxDim = 128;

// Offsets must start at 0, never fall, and stay within the rows. Only readable on the CPU.
void check_offsets(const Tensor& cu, int64_t rows, const char* name) {
  const int32_t* at = static_cast<const int32_t*>(cu.const_data_ptr());
  check(at[0] == 0, kOp, name, at[0], "a first offset of 0",
        "prefix sums of the lengths with a leading 0");
  for (int64_t i = 1; i < cu.size(0); ++i) {
    if (at[i] < at[i - 1]) {
      std::ostringstream got;
      got << at[i - 1] << " then " << at[i] << " at place " << i;
      check(false, kOp, name, got.str(), "offsets that never fall", "prefix sums of the lengths");
    }
  }
  const int64_t last = at[cu.size(0) - 1];
  check(last <= rows, kOp, name, last, "a last offset within the packed rows",
        "offsets made from the same mask as the rows");
}

void check_offset_tensor(const Tensor& cu, const Tensor& q, const char* name) {
  if (cu.scalar_type() != ScalarType::Int) {
    check(false, kOp, name, torch::headeronly::toString(cu.scalar_type()), "int32",
          "cu_seqlens.int()");
  }
  check(cu.dim() == 1 && cu.size(0) >= 1 && (cu.size(0) < 2 || cu.stride(0) == 1), kOp, name, cu,
        "a contiguous [B + 1]", "one offset per sequence and a leading 0");
  check(cu.is_cpu() == q.is_cpu() && cu.get_device_index() == q.get_device_index(), kOp, name,
        "a tensor on another device", "the device of q", "cu_seqlens.to(q.device)");
}

// A [T, H, D] operand whose rows a kernel can read in place; anything odd is copied once.
Tensor rows_operand(const Tensor& t, int64_t heads, int64_t dim, const char* name) {
  const bool fits = t.dim() == 3 && t.size(1) == heads && t.size(2) == dim;
  check(fits, kOp, name, t, "[T, H, D] with the H and D of q", "the same heads for q, k and v");
  const bool in_place = t.stride(2) == 1 && t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0;
  return in_place ? t : torch::stable::contiguous(t);
}

std::tuple<Tensor, Tensor> attn_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                       Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                       int64_t max_seqlen_k, double scale,
                                       std::optional<Tensor> alibi_slopes, int64_t window_left,
                                       int64_t window_right, std::optional<Tensor> key_bias) {
  AttnVarlenArgs args{};
  args.dtype = dtype_of(q, kOp, "q");
  check(q.dim() == 3, kOp, "q", q, "[T, H, D]", "q.view(rows, heads, head_dim)");
  const int64_t heads = q.size(1), dim = q.size(2);
  check(heads > 0, kOp, "heads", heads, "at least one", "q.view(rows, heads, head_dim)");
  check(dim > 0 && dim <= kMaxDim && dim % 8 == 0, kOp, "head dimension", dim,
        "a multiple of 8, at most 128", "zero-padding q, k and v to the next multiple of 8");
  check_like(k, q, kOp, "k");
  check_like(v, q, kOp, "v");
  q = rows_operand(q, heads, dim, "q");
  k = rows_operand(k, heads, dim, "k");
  v = rows_operand(v, heads, dim, "v");
  check(k.size(0) == v.size(0), kOp, "rows of v", v.size(0), "as many as k",
        "k and v of the same tokens");
  check_offset_tensor(cu_seqlens_q, q, "cu_seqlens_q");
  check_offset_tensor(cu_seqlens_k, q, "cu_seqlens_k");
  check(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), kOp, "cu_seqlens_k", cu_seqlens_k,
        "as many sequences as cu_seqlens_q", "one key segment per query segment");
  check(max_seqlen_q >= 0 && max_seqlen_k >= 0, kOp, "max_seqlen",
        std::min(max_seqlen_q, max_seqlen_k), "0 or more", "the longest sequence, or 0 if unknown");
  check(window_left >= -1 && window_right >= -1, kOp, "window", std::min(window_left, window_right),
        "-1 (no bound) or more", "(-1, -1)");
  check_offsets(cu_seqlens_q, q.size(0), "cu_seqlens_q");
  check_offsets(cu_seqlens_k, k.size(0), "cu_seqlens_k");
  for (const auto& [t, n, name] : {std::make_tuple(&alibi_slopes, heads, "alibi_slopes"),
                                   std::make_tuple(&key_bias, k.size(0), "key_bias")}) {
    if (!*t) continue;
    if ((*t)->scalar_type() != ScalarType::Float) {
      check(false, kOp, name, torch::headeronly::toString((*t)->scalar_type()), "float32",
            "tensor.float()");
    }
    check((*t)->is_cpu() == q.is_cpu() && (*t)->get_device_index() == q.get_device_index(), kOp,
          name, "a tensor on another device", "the device of q", "tensor.to(q.device)");
    check((*t)->dim() == 1 && (*t)->size(0) == n && (n < 2 || (*t)->stride(0) == 1), kOp, name, **t,
          "a contiguous [H] (alibi_slopes) or [Tk] (key_bias)",
          "tensor.contiguous() of the right length");
  }

  Tensor out = torch::stable::new_empty(q, {q.size(0), heads, dim});
  Tensor lse = torch::stable::new_empty(q, {heads, q.size(0)}, ScalarType::Float);
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.cu_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr());
  args.cu_k = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  args.alibi_slopes =
      alibi_slopes ? static_cast<const float*>(alibi_slopes->const_data_ptr()) : nullptr;
  args.key_bias = key_bias ? static_cast<const float*>(key_bias->const_data_ptr()) : nullptr;
  args.q_row = q.stride(0), args.q_head = q.stride(1);
  args.k_row = k.stride(0), args.k_head = k.stride(1);
  args.v_row = v.stride(0), args.v_head = v.stride(1);
  args.out_row = out.stride(0), args.out_head = out.stride(1);
  args.rows_q = q.size(0);
  args.sequences = cu_seqlens_q.size(0) - 1;
  args.heads = heads;
  args.dim = dim;
  args.window_left = window_left;
  args.window_right = window_right;
  args.scale = static_cast<float>(scale);
  attn_varlen_cpu(args);
  return {out, lse};
}

}  // namespace
}  // namespace filbert

STABLE_TORCH_LIBRARY_IMPL(filbert, CPU, m) {
  m.impl("attn_varlen", TORCH_BOX(&filbert::attn_varlen));
}
