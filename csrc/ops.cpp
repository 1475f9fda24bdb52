// Every operator schema of filbert, and nothing else. Implementations register in csrc/torch.
// T rows of all sequences together, B sequences, H heads, D elements a head, N hidden width or
// outputs, K inputs.
#include "torch/shared/device.h"

#define FILBERT_LIBRARY_(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define FILBERT_LIBRARY(m) FILBERT_LIBRARY_(FILBERT_NAMESPACE, m)

FILBERT_LIBRARY(m) {
  // q [Tq,H,D], k and v [Tk,H,D], cu_seqlens [B+1], slopes [H], key_bias [Tk] -> out [Tq,H,D], lse
  // [H,Tq]
  m.def(
      "attn_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, Tensor? alibi_slopes=None, "
      "SymInt window_left=-1, SymInt window_right=-1, Tensor? key_bias=None, Tensor? tiles=None) "
      "-> (Tensor out, Tensor lse)");
  // the work list of attn_varlen on a GPU, from cu_seqlens [B+1] -> [4 + 8 C]; see
  // args/attn_tiles.h
  m.def(
      "attn_tiles(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt rows_q, SymInt rows_k) -> "
      "Tensor");

  // x and residual [T,N], bias, weight and beta [N] -> [T,N]
  m.def(
      "norm_residual(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor beta, float "
      "eps) "
      "-> Tensor");
  // the same with codes [T,N], scale and zero [T] of the result
  m.def(
      "norm_residual_codes(Tensor x, Tensor? bias, Tensor? residual, Tensor weight, Tensor beta, "
      "float eps) -> (Tensor rows, Tensor codes, Tensor scale, Tensor zero)");
  // the same without codes, written over x
  m.def(
      "norm_residual_(Tensor(a!) x, Tensor? bias, Tensor? residual, Tensor weight, Tensor beta, "
      "float eps) "
      "-> ()");

  // x [T,N] overwritten, bias [N]; approximate is "none" or "tanh"
  m.def("bias_gelu_(Tensor(a!) x, Tensor? bias=None, str approximate='none') -> ()");

  // x and residual [T,K] and [T,N], weight [ceil(N/16),K,16] or bfloat16
  // [ceil(N/16),ceil(K/2),16,2], bias, norm_weight and norm_bias [N] -> [T,N]; activation is none,
  // gelu, gelu_tanh, relu or silu
  m.def(
      "linear_dense(Tensor x, Tensor weight, SymInt outputs, Tensor? bias=None, str "
      "activation='none', Tensor? residual=None, Tensor? norm_weight=None, Tensor? "
      "norm_bias=None, float eps=0.0) -> Tensor");

  // x [T,K], factors [R,K], [I,R], [S,I] and [N,S] packed as linear_dense's, where no up_a or
  // down_b is the identity, up_bias [I], down_bias, norm_weight and norm_bias [N], residual [T,N]
  // -> [T,N]
  m.def(
      "ffn_lowrank(Tensor x, Tensor? up_a, Tensor up_b, Tensor? up_bias, Tensor down_a, Tensor? "
      "down_b, Tensor? down_bias, SymInt up_rank, SymInt inner, SymInt down_rank, SymInt outputs, "
      "str activation='gelu', Tensor? residual=None, Tensor? norm_weight=None, Tensor? "
      "norm_bias=None, float eps=0.0) -> Tensor");

  // x [T,K], factors [R,K] and [N,R] packed as linear_dense's, bias, norm_weight and norm_bias [N],
  // residual [T,N] -> [T,N]
  m.def(
      "linear_lowrank(Tensor x, Tensor a, Tensor b, SymInt rank, SymInt outputs, Tensor? "
      "bias=None, "
      "str activation='none', Tensor? residual=None, Tensor? norm_weight=None, Tensor? "
      "norm_bias=None, float eps=0.0) -> Tensor");
  // latent [T,L], query, key and value [H,D,R], each head packed as linear_dense's, cu_seqlens
  // [B+1], bias [3*H*D], key_bias [T]; three ranks, first columns of latent and numbers of groups
  // -> [T,H,D]
  m.def(
      "attn_lowrank(Tensor latent, Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, "
      "SymInt max_seqlen, int head_dim, int[] ranks, int[] begins, int[] groups, float scale, "
      "Tensor? bias=None, Tensor? key_bias=None) -> Tensor");

  // x [T,K], scale and zero [1] -> codes [T,K] of 8 bits, scale and zero [T]
  m.def(
      "quantize_rows(Tensor x, Tensor? scale=None, Tensor? zero=None) -> (Tensor codes, Tensor "
      "scale, Tensor zero)");

  // x [T,K] of numbers, or of codes with x_scale and x_zero [T]; weight [ceil(N/16),ceil(K/32),64
  // bits], scale, totals and bias [N], multiplier and offset [ceil(N/16),G,16], residual [T,N] ->
  // [T,N]; see args/linear_grouped.h
  m.def(
      "linear_grouped(Tensor x, Tensor weight, Tensor scale, Tensor totals, int bits, Tensor? "
      "x_scale=None, Tensor? x_zero=None, Tensor? multiplier=None, Tensor? offset=None, Tensor? "
      "bias=None, str activation='none', Tensor? residual=None, Tensor? norm_weight=None, Tensor? "
      "norm_bias=None, float eps=0.0, str dtype='float32') -> Tensor");
  // the same with codes [T,N], scale and zero [T] of the result; rows [T,N] with a norm, else [0,N]
  m.def(
      "linear_grouped_codes(Tensor x, Tensor weight, Tensor scale, Tensor totals, int bits, "
      "Tensor? "
      "x_scale=None, Tensor? x_zero=None, Tensor? multiplier=None, Tensor? offset=None, Tensor? "
      "bias=None, str activation='none', Tensor? residual=None, Tensor? norm_weight=None, Tensor? "
      "norm_bias=None, float eps=0.0, str dtype='float32') -> (Tensor rows, Tensor codes, Tensor "
      "scale, Tensor zero)");

  // ids [T], codes [V,N] or, of 4 bits, [V,ceil(N/2)], scale [V], norm_weight and norm_bias [N] ->
  // [T,N]
  m.def(
      "embedding_grouped(Tensor ids, Tensor codes, Tensor scale, SymInt width, Tensor? "
      "position_ids=None, Tensor? position_codes=None, Tensor? position_scale=None, Tensor? "
      "type_ids=None, Tensor? type_codes=None, Tensor? type_scale=None, Tensor? norm_weight=None, "
      "Tensor? norm_bias=None, float eps=0.0, str dtype='float32') -> Tensor");

  // x [R,N] of any dtype, index [T] -> [T,N]
  m.def("gather_rows(Tensor x, Tensor index) -> Tensor");

  // Bits: P planes of W = ceil(K/32) words a row. x [T,K], threshold [K] -> words [P,T,W], sums
  // [T]; ties is "below", "above" or "exact"
  m.def(
      "pack_bits(Tensor x, Tensor? threshold=None, str ties='below') -> (Tensor words, Tensor "
      "sums)");
  // x [T,K], scale [T] -> words [bits,T,W], sums and scale [T]
  m.def(
      "pack_codes(Tensor x, int bits, int low, Tensor? scale=None) -> (Tensor words, Tensor sums, "
      "Tensor scale)");
  // words [P,T,W], sums and scale [T], weight [ceil(N/16),W,16], totals, alpha, bias, norm_weight
  // and norm_bias [N], residual [T,N] -> [T,N]
  m.def(
      "linear_binary(Tensor words, Tensor sums, Tensor weight, Tensor totals, Tensor alpha, "
      "Tensor? bias=None, Tensor? scale=None, int step=2, int low=-1, Tensor? residual=None, "
      "Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=0.0, str dtype='float32') -> "
      "Tensor");
  // the same with threshold, until, lower and lower_until [N] -> words [P,T,ceil(N/32)], sums [T];
  // P is 1, or 2 with a lower bit
  m.def(
      "linear_binary_bits(Tensor words, Tensor sums, Tensor weight, Tensor totals, Tensor "
      "threshold, int step=2, int low=-1, Tensor? until=None, Tensor? lower=None, Tensor? "
      "lower_until=None) -> (Tensor words, Tensor sums)");
  // q, k and v [T,H*D/32] bits, cu_seqlens [B+1], threshold [H*D], table [D+1] ->
  // words [P,T,H*D/32], sums [T]
  m.def(
      "attn_binary(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, int heads, "
      "int head_dim, Tensor? threshold=None, str ties='below', str score_ties='below', Tensor? "
      "table=None, float half=0.0) -> (Tensor words, Tensor sums)");
}
