#include "args/attn_binary.h"

#include <tuple>

#include "torch/shared/binary.h"
#include "torch/shared/offsets.h"
#include "torch/shared/text.h"

namespace filbert {
namespace {

constexpr const char* kOp = "attn_binary";
constexpr int64_t kMaxHeads = 65536;  // far beyond any model, and small enough to be multiplied

// Bits of every head, in rows of any stride.
int64_t read_bits(const Tensor& t, const Tensor& like, int64_t words, const char* name) {
  check_same_device(t, like, kOp, name);
  check_type(t, ScalarType::Int, kOp, name);
  check(t.dim() == 2 && t.size(0) == like.size(0) && t.size(1) == words &&
            (words < 2 || t.stride(1) == 1),
        kOp, name, t, "[T, H * D / 32] with contiguous words",
        "a plane of packed bits: PackedBits.words[0]");
  return t.stride(0);
}

std::tuple<Tensor, Tensor> attn_binary(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens,
                                       int64_t max_seqlen, int64_t heads, int64_t head_dim,
                                       std::optional<Tensor> threshold, StringHandle ties_text,
                                       StringHandle score_ties_text, std::optional<Tensor> table,
                                       double half) {
  const std::string ties = take_text(ties_text), score_ties = take_text(score_ties_text);
  AttnBinaryArgs args{};
  check(heads >= 1 && heads <= kMaxHeads, kOp, "heads", heads, "1 to 65536",
        "the model's number of heads");
  check(head_dim >= 32 && head_dim % 32 == 0 && head_dim <= kMaxBinaryDim, kOp, "head_dim",
        head_dim, "a multiple of 32 up to 128", "float attention for other heads");
  const int64_t words = heads * head_dim / 32;
  check_row_count(q.dim() == 2 ? q.size(0) : 0, kOp, "rows of q");
  args.q_row = read_bits(q, q, words, "q");
  args.k_row = read_bits(k, q, words, "k");
  args.v_row = read_bits(v, q, words, "v");
  args.rows = q.size(0);
  check_offset_tensor(kOp, cu_seqlens, q, "cu_seqlens");
  check_offsets(kOp, cu_seqlens, args.rows, "cu_seqlens");
  check(max_seqlen >= 0, kOp, "max_seqlen", max_seqlen, "0 or more",
        "the longest sequence, or 0 if unknown");
  if (threshold) {
    check_vector_of(*threshold, ScalarType::Int, heads * head_dim, q, kOp, "threshold");
  }
  if (table) check_vector_of(*table, ScalarType::Long, head_dim + 1, q, kOp, "table");
  args.ties = ties_of(ties, kOp, "ties");
  const Ties of_scores = ties_of(score_ties, kOp, "score_ties");
  check(of_scores != Ties::kExact, kOp, "score_ties", score_ties, "'below' or 'above'",
        "score_ties='below'");
  args.choose_zeros = of_scores == Ties::kAbove;
  args.half = half;
  args.sequences = cu_seqlens.size(0) - 1;
  args.heads = heads;
  args.dim = head_dim;
  args.max_seqlen = max_seqlen;
  Tensor out = empty_words(q, planes_of(args.ties), args.rows, heads * head_dim);
  Tensor sums = empty_sums(q, args.rows);
  if (args.rows == 0) return {out, sums};
  Call call(q);
  args.q = call.read<uint32_t>(q);
  args.k = call.read<uint32_t>(k);
  args.v = call.read<uint32_t>(v);
  args.cu = call.read<int32_t>(cu_seqlens);
  args.threshold = threshold ? call.read<int32_t>(*threshold) : nullptr;
  args.table = table ? call.read<int64_t>(*table) : nullptr;
  args.words = call.write<uint32_t>(out);
  args.sums = call.write<int32_t>(sums);
  FILBERT_RUN(attn_binary, args, call);
  call.finish();
  return {out, sums};
}

}  // namespace
}  // namespace filbert

FILBERT_LIBRARY_IMPL(m) { m.impl("attn_binary", TORCH_BOX(&filbert::attn_binary)); }
