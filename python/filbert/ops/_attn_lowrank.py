"""`attn_lowrank`: attention whose query, key and value are rebuilt from latents, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._attn_varlen import reference_attn_varlen
from ._linear_dense import pack_dense, unpack_dense
from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register


def pack_heads(weight: Tensor, heads: int) -> Tensor:
    """The factor of one of query, key and value in the layout of :func:`attn_lowrank`.

    Args:
        weight: B ``[H*D, R]``, float32, float16 or bfloat16; the rows of a head follow each other.
        heads: H.

    Returns:
        ``[H, ceil(D/16), R, 16]``, for bfloat16 ``[H, ceil(D/16), ceil(R/2), 16, 2]``:
        :func:`pack_dense` of each head. Where D is a multiple of 16 that is :func:`pack_dense` of
        the whole weight, seen as heads.

    Raises:
        ValueError: rows that are no whole heads, or what :func:`pack_dense` refuses.
    """
    if weight.ndim != 2 or heads < 1 or weight.shape[0] % heads:
        raise ValueError(f"weight: got {tuple(weight.shape)} for {heads} heads, need [H * D, R]")
    return torch.stack([pack_dense(head) for head in weight.chunk(heads)])


def attn_lowrank(
    latent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    ranks: Sequence[int],
    scale: float,
    *,
    begins: Sequence[int] = (0, 0, 0),
    groups: Sequence[int] = (1, 1, 1),
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Self-attention over packed sequences whose query, key and value are products of latents and
    thin factors, on a CPU.

    ``latent`` is ``x A^T`` for the first factors of all three. A thread rebuilds query, key and
    value of one head of one sequence, attends, and goes on: as wide as the model they never exist.
    Nothing is rebuilt twice. The result is to the bit that of :func:`filbert.linear_dense` for each
    head and :func:`filbert.attn_varlen`, and so the same alone and in any batch.

    Factors may be of whole matrices, of groups of heads or of single heads. Head ``h`` reads
    ``rank`` columns of ``latent`` from ``begin + h // (H // groups) * rank`` on. With the defaults
    all heads and all three of query, key and value share the latents.

    Args:
        latent: ``[T, L]`` rows, float32 or bfloat16; any row stride.
        query: :func:`pack_heads` of B ``[H*D, R]``; dtypes as :func:`filbert.linear_dense` takes
            weights.
        key: likewise, in the dtype of ``query``.
        value: likewise.
        cu_seqlens: ``[B+1]`` int32; starts at 0, never falls, ends at most at ``T``. The output of
            rows past its end is 0.
        max_seqlen: length of the longest sequence; a hint, results never depend on it.
        head_dim: D, 1 to 256.
        ranks: R of query, key and value, each any from 1 to that of its factors, of which the first
            columns are used.
        scale: factor on ``q·k``, usually ``D ** -0.5``.
        begins: the first columns of each in ``latent``.
        groups: of each, a divisor of H.
        bias: ``[3*H*D]`` in the dtype of ``latent`` added to query, key and value, or None.
        key_bias: ``[T]`` float32 added to every score of that key; ``-inf`` hides the key.

    Returns:
        ``[T, H, D]`` in the dtype of ``latent``; 0 for a query that sees no key.

    Raises:
        RuntimeError: shapes, dtypes, factors or ``cu_seqlens`` that do not fit, or CUDA tensors.

    Paper: FlashSVD, arXiv 2508.01506.
    """
    if latent.is_cuda:
        raise RuntimeError(
            f"attn_lowrank: device; got {latent.device}; need cpu; try a product for each factor "
            "and attn_varlen there"
        )
    run: Any = reference_attn_lowrank
    if calling.compiled("attn_lowrank", latent):
        run = calling.kernels().attn_lowrank
    else:
        calling.one_device(
            "attn_lowrank", latent, query=query, key=key, value=value, cu_seqlens=cu_seqlens,
            bias=bias, key_bias=key_bias,
        )  # fmt: skip
    result: Tensor = run(
        latent, query, key, value, cu_seqlens, max_seqlen, head_dim, ranks, begins, groups, scale,
        bias, key_bias,
    )  # fmt: skip
    return result


def reference_attn_lowrank(
    latent: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim: int,
    ranks: Sequence[int],
    begins: Sequence[int],
    groups: Sequence[int],
    scale: float,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Meaning of :func:`filbert.ops.attn_lowrank`: in float32, or wider, and one rounding."""
    heads, wide = query.shape[0], latent.to(wide_dtype(latent.dtype))
    biases = [None] * 3 if bias is None else bias.to(wide.dtype).view(3, heads, head_dim)
    made = []
    for packed, rank, begin, count, add in zip(
        (query, key, value), ranks, begins, groups, biases, strict=True
    ):
        of_heads = []
        for head in range(heads):
            column = begin + head // (heads // count) * rank
            held = packed.shape[2] * (2 if packed.dtype == torch.bfloat16 else 1)
            factor = unpack_dense(packed[head], head_dim, held)[:, :rank].to(wide.dtype)
            of_heads.append(wide[:, column : column + rank] @ factor.T)
        side = torch.stack(of_heads, 1)
        made.append(side if add is None else side + add)
    q, k, v = made
    out, _ = reference_attn_varlen(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, key_bias=key_bias
    )
    return out.to(latent.dtype)


def _fake_attn_lowrank(
    latent, query, key, value, cu_seqlens, max_seqlen, head_dim, ranks, begins, groups, scale,
    bias=None, key_bias=None,
):  # fmt: skip
    calling.one_device(
        "attn_lowrank", latent, query=query, key=key, value=value, cu_seqlens=cu_seqlens,
        bias=bias, key_bias=key_bias,
    )  # fmt: skip
    return latent.new_empty((latent.shape[0], query.shape[0], head_dim))


def _explain_attn_lowrank(
    latent: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    head_dim: int, ranks: Sequence[int], *_: Any, **__: Any,
) -> dict[str, Any]:  # fmt: skip
    rows, heads, size = latent.shape[0], query.shape[0], latent.element_size()
    lengths = cu_seqlens.diff()
    rebuilt = sum(2 * rows * heads * head_dim * rank for rank in ranks)
    scores = 4 * int((lengths.long() ** 2).sum()) * heads * head_dim
    held = sum(t.numel() * t.element_size() for t in (query, key, value))
    longest = int(lengths.max()) if len(lengths) else 0
    return {
        "work": f"{rebuilt:,} floating-point operations to rebuild, {scores:,} to attend",
        "memory": f"{held + rows * (latent.shape[1] + heads * head_dim) * size:,} bytes read and "
        "written",
        "rebuilt": f"{3 * longest * head_dim * size:,} bytes for each thread, in the place of "
        f"{3 * rows * heads * head_dim * size:,}",
    }


register(
    Operator(
        "attn_lowrank",
        "attention over low-rank latents, without wide query, key and value",
        fake=_fake_attn_lowrank,
        reference=reference_attn_lowrank,
        explain=_explain_attn_lowrank,
        devices=("cpu",),
    )
)
