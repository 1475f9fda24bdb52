// Every operator schema of filbert, and nothing else. Implementations register in csrc/torch.
// T rows of all sequences together, B sequences, H heads, D elements a head, N hidden width.
#include "torch/device.h"

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
  // the same, written over x
  m.def(
      "norm_residual_(Tensor(a!) x, Tensor? bias, Tensor? residual, Tensor weight, Tensor beta, "
      "float eps) "
      "-> ()");

  // x [T,N] overwritten, bias [N]; approximate is "none" or "tanh"
  m.def("bias_gelu_(Tensor(a!) x, Tensor? bias=None, str approximate='none') -> ()");

  // x [R,N] of any dtype, index [T] -> [T,N]
  m.def("gather_rows(Tensor x, Tensor index) -> Tensor");
}
