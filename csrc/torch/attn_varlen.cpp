#include "args/attn_varlen.h"

#include <algorithm>
#include <tuple>

#include "args/attn_tiles.h"
#include "torch/shared/device.h"
#include "torch/shared/offsets.h"

namespace filbert {
namespace {

constexpr const char* kOp = "attn_varlen";
constexpr int64_t kMaxDim = kOnGpu ? kAttnMaxDimCuda : kAttnMaxDim;

// What is missing to the next head dimension that the kernels have.
constexpr int64_t padding_of(int64_t dim) {
  return kOnGpu ? (kAttnDimStepCuda - dim % kAttnDimStepCuda) % kAttnDimStepCuda : 0;
}

// A [T, H, D] operand whose rows a kernel can read in place; anything odd is copied once. On a GPU
// it comes back with zeros up to the next D that the kernels have: they add nothing to any score,
// and columns of zeros to the output.
Tensor rows_operand(const Tensor& t, int64_t heads, int64_t dim, const char* name) {
  const bool fits = t.dim() == 3 && t.size(1) == heads && t.size(2) == dim;
  check(fits, kOp, name, t, "[T, H, D] with the H and D of q", "the same heads for q, k and v");
  if (!kOnGpu) return t.stride(2) == 1 || dim == 1 ? t : torch::stable::contiguous(t);
  if (padding_of(dim) > 0) return torch::stable::pad(t, {0, padding_of(dim)});
  const bool in_place = t.stride(2) == 1 && t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0;
  const Tensor rows = in_place ? t : torch::stable::contiguous(t);
  // A GPU's 16-byte copies want alignment too. Fresh memory has it; a view may begin anywhere, and
  // contiguous() returns it as it is where sizes of 1 hide odd strides.
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  return aligned ? rows : torch::stable::clone(rows);
}

#if defined(FILBERT_CUDA) || defined(FILBERT_HOSTCUDA)
// The work list, made on the device.
Tensor make_tiles(const Tensor& cu_q, const Tensor& cu_k, int64_t rows_q, int64_t rows_k) {
  AttnTilesArgs args{};
  args.rows_q = rows_q;
  args.rows_k = rows_k;
  args.sequences = cu_q.size(0) - 1;
  args.capacity = tile_capacity(rows_q, args.sequences);
  Tensor tiles = torch::stable::new_empty(cu_q, {tile_values(args.capacity)});
  Call call(cu_q);
  args.cu_q = call.read<int32_t>(cu_q);
  args.cu_k = call.read<int32_t>(cu_k);
  args.tiles = call.write<int32_t>(tiles);
  FILBERT_RUN(attn_tiles, args, call);
  call.finish();
  return tiles;
}

Tensor attn_tiles(Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t rows_q, int64_t rows_k) {
  check_offset_tensor("attn_tiles", cu_seqlens_q, cu_seqlens_q, "cu_seqlens_q");
  check_offset_tensor("attn_tiles", cu_seqlens_k, cu_seqlens_q, "cu_seqlens_k");
  check(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), "attn_tiles", "cu_seqlens_k", cu_seqlens_k,
        "as many sequences as cu_seqlens_q", "one key segment per query segment");
  check(rows_q >= 0 && rows_k >= 0, "attn_tiles", "rows", std::min(rows_q, rows_k), "0 or more",
        "q.shape[0] and k.shape[0]");
  return make_tiles(cu_seqlens_q, cu_seqlens_k, rows_q, rows_k);
}
#endif

std::tuple<Tensor, Tensor> attn_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,
                                       Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                       int64_t max_seqlen_k, double scale,
                                       std::optional<Tensor> alibi_slopes, int64_t window_left,
                                       int64_t window_right, std::optional<Tensor> key_bias,
                                       std::optional<Tensor> tiles) {
  AttnVarlenArgs args{};
  args.dtype = dtype_of(q, kOp, "q");
  check(q.dim() == 3, kOp, "q", q, "[T, H, D]", "q.view(rows, heads, head_dim)");
  const int64_t heads = q.size(1), dim = q.size(2);
  check(heads > 0, kOp, "heads", heads, "at least one", "q.view(rows, heads, head_dim)");
  check(dim > 0 && dim <= kMaxDim, kOp, "head dimension", dim,
        kOnGpu ? "1 to 128 on a GPU" : "1 to 256 on a CPU",
        kOnGpu ? "more heads of fewer values, or tensors on the CPU, where it may be 256"
               : "more heads of fewer values");
  check_like(k, q, kOp, "k");
  check_like(v, q, kOp, "v");
  q = rows_operand(q, heads, dim, "q");
  k = rows_operand(k, heads, dim, "k");
  v = rows_operand(v, heads, dim, "v");
  check(k.size(0) == v.size(0), kOp, "rows of v", v.size(0), "as many as k",
        "k and v of the same tokens");
  check_offset_tensor(kOp, cu_seqlens_q, q, "cu_seqlens_q");
  check_offset_tensor(kOp, cu_seqlens_k, q, "cu_seqlens_k");
  check(cu_seqlens_q.size(0) == cu_seqlens_k.size(0), kOp, "cu_seqlens_k", cu_seqlens_k,
        "as many sequences as cu_seqlens_q", "one key segment per query segment");
  check(max_seqlen_q >= 0 && max_seqlen_k >= 0, kOp, "max_seqlen",
        std::min(max_seqlen_q, max_seqlen_k), "0 or more", "the longest sequence, or 0 if unknown");
  check(window_left >= -1 && window_right >= -1, kOp, "window", std::min(window_left, window_right),
        "-1 (no bound) or more", "(-1, -1)");
  check_offsets(kOp, cu_seqlens_q, q.size(0), "cu_seqlens_q");
  check_offsets(kOp, cu_seqlens_k, k.size(0), "cu_seqlens_k");
  for (const auto& [t, n, name] : {std::make_tuple(&alibi_slopes, heads, "alibi_slopes"),
                                   std::make_tuple(&key_bias, k.size(0), "key_bias")}) {
    if (!*t) continue;
    check_same_device(**t, q, kOp, name);
    if ((*t)->scalar_type() != ScalarType::Float) {
      check(false, kOp, name, torch::headeronly::toString((*t)->scalar_type()), "float32",
            "tensor.float()");
    }
    check((*t)->dim() == 1 && (*t)->size(0) == n && (n < 2 || (*t)->stride(0) == 1), kOp, name, **t,
          "a contiguous [H] (alibi_slopes) or [Tk] (key_bias)",
          "tensor.contiguous() of the right length");
  }

  Tensor out = torch::stable::new_empty(q, {q.size(0), heads, dim + padding_of(dim)});
  Tensor lse = torch::stable::new_empty(q, {heads, q.size(0)}, ScalarType::Float);
  args.sequences = cu_seqlens_q.size(0) - 1;
  args.capacity = tile_capacity(q.size(0), args.sequences);
  args.self_attention =
      q.size(0) == k.size(0) && cu_seqlens_q.const_data_ptr() == cu_seqlens_k.const_data_ptr();
#if defined(FILBERT_CUDA) || defined(FILBERT_HOSTCUDA)
  if (tiles) {
    check_same_device(*tiles, q, kOp, "tiles");
    check(tiles->scalar_type() == ScalarType::Int && tiles->dim() == 1 && tiles->is_contiguous() &&
              tiles->size(0) == tile_values(args.capacity),
          kOp, "tiles", *tiles, "what attn_tiles makes of these cu_seqlens and rows",
          "attn_tiles(cu_seqlens_q, cu_seqlens_k, len(q), len(k)), or None");
  } else {
    tiles = make_tiles(cu_seqlens_q, cu_seqlens_k, q.size(0), k.size(0));
  }
#endif
  Call call(q);
  args.q = call.read(q);
  args.k = call.read(k);
  args.v = call.read(v);
  args.out = call.write(out);
  args.lse = call.write<float>(lse);
  args.cu_q = call.read<int32_t>(cu_seqlens_q);
  args.cu_k = call.read<int32_t>(cu_seqlens_k);
  args.alibi_slopes = alibi_slopes ? call.read<float>(*alibi_slopes) : nullptr;
  args.key_bias = key_bias ? call.read<float>(*key_bias) : nullptr;
  args.tiles = tiles ? call.read<int32_t>(*tiles) : nullptr;
  args.q_row = q.stride(0), args.q_head = q.stride(1);
  args.k_row = k.stride(0), args.k_head = k.stride(1);
  args.v_row = v.stride(0), args.v_head = v.stride(1);
  args.out_row = out.stride(0), args.out_head = out.stride(1);
  args.rows_q = q.size(0);
  args.rows_k = k.size(0);
  args.heads = heads;
  args.dim = dim + padding_of(dim);
  args.window_left = window_left;
  args.window_right = window_right;
  args.scale = static_cast<float>(scale);
  FILBERT_RUN(attn_varlen, args, call);
  call.finish();
  if (padding_of(dim) > 0) {
    out = torch::stable::contiguous(torch::stable::narrow(out, 2, 0, dim));
  }
  return {out, lse};
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) {
  m.impl("attn_varlen", TORCH_BOX(&filbert::attn_varlen));
#if defined(FILBERT_CUDA) || defined(FILBERT_HOSTCUDA)
  m.impl("attn_tiles", TORCH_BOX(&filbert::attn_tiles));
#endif
}
