"""The dense filling of an encoder layer's slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import ops
from ..layer import EncoderLayer, FeedForward, RowNorm
from ..parts import LayerParts
from .attention import DenseAttention, pad_heads
from .linear import PackedLinear, gelu_kind, row_dtype

__all__ = ["dense_layer"]


def dense_layer(
    parts: LayerParts,
    *,
    compute_dtype: torch.dtype | None = None,
    fold_bias: bool = True,
    split_query: bool = False,
) -> EncoderLayer:
    """A layer whose slots are dense: QKV GEMM, attention per sequence, output GEMM, feed-forward
    GEMMs, each with what follows it fused where the GEMM can.

    Args:
        parts: the original modules. They are read, not kept.
        compute_dtype: dtype of the rows, float32 or bfloat16, on CUDA also float16;
            :func:`~filbert.nn.dense.linear.row_dtype` if not given.
        fold_bias: see :class:`filbert.plan.PackedEncoderConfig`.
        split_query: keep the query weight apart from key and value, so that the layer can compute
            first rows alone.
    """
    weight = parts.query.weight
    dtype = compute_dtype or row_dtype(weight.dtype, weight.device)
    heads, padding = parts.num_heads, -parts.head_dim % ops.head_dims(weight.device).step

    def padded(t: Tensor, dim: int = 0) -> Tensor:
        return pad_heads(t, dim, heads, padding)

    def packed(linears: Sequence[nn.Linear], biases: Sequence[Tensor | None]) -> PackedLinear:
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat(
                [
                    padded(m.weight.new_zeros(m.out_features) if b is None else b.detach())
                    for m, b in zip(linears, biases, strict=True)
                ]
            )
        return PackedLinear([padded(m.weight) for m in linears], bias, compute_dtype=dtype)

    with torch.no_grad():
        q: Tensor | None = parts.query.bias
        k: Tensor | None = parts.key.bias
        v: Tensor | None = parts.value.bias
        bias: Tensor | None = parts.out.bias
        if fold_bias:
            # softmax_j(q·(k_j + b_k)) is softmax_j(q·k_j), and sum_j p_j (v_j + b_v) is
            # sum_j p_j v_j + b_v because the weights sum to 1.
            if v is not None:
                folded = parts.out.weight.double() @ v.double()
                bias = folded if bias is None else bias.double() + folded
            k = v = None
        if split_query:
            linears = [packed([parts.query], [q]), packed([parts.key, parts.value], [k, v])]
        else:
            linears = [packed([parts.query, parts.key, parts.value], [q, k, v])]
        kind = gelu_kind(parts.activation)
        up = PackedLinear([parts.up.weight], parts.up.bias, activation=kind, compute_dtype=dtype)
        layer = EncoderLayer(
            DenseAttention(linears, heads, parts.scale, head_padding=padding),
            PackedLinear([padded(parts.out.weight, 1)], bias, compute_dtype=dtype),
            RowNorm.of(parts.attn_norm, dtype),
            # Any other activation is the model's own function, run on the GEMM's result.
            FeedForward(
                up,
                PackedLinear([parts.down.weight], parts.down.bias, compute_dtype=dtype),
                None if kind else parts.activation,
            ),
            RowNorm.of(parts.ffn_norm, dtype),
        )
    for _, linear in layer.linears():
        linear.trainable = False  # the encoder asks, once a call and for flags of now
    return layer
