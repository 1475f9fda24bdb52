"""`attn_binary`: attention in which queries, keys, values and weights are bits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .shared import calling
from .shared.operator import Operator, register
from .shared.words import compare, planes_like, words_to_bits


def attn_binary(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    head_dim: int,
    *,
    threshold: Tensor | None = None,
    ties: str = "below",
    score_ties: str = "below",
    table: Tensor | None = None,
    half: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences in which queries, keys, values and weights are bits.

    With ``q``, ``k`` and ``v`` of ±1, the score of a query and a key is ``S = q · k``, an integer.
    A key is chosen or not, and the context is the sum of the chosen values, again an integer, of
    which bits are made at once.

    - Without ``table`` it is BiBERT's Boolean attention: keys with ``S > 0`` are chosen.
    - With ``table`` it is BiT's thresholded softmax: ``p = softmax(c S)`` is chosen where it rounds
      up, ``p > half``. A score is one of ``D + 1`` values, so ``table[j]`` holds the weight
      ``exp(-2 c j)`` of a key that misses the row's best score by ``2 j``, as an integer.

    Sequence ``s`` is the rows ``cu_seqlens[s]:cu_seqlens[s + 1]`` and sees no other rows.

    Args:
        q: int32 ``[T, H * D / 32]`` bits, a one being +1; any row stride, contiguous words.
        k: likewise.
        v: likewise.
        cu_seqlens: int32 ``[B + 1]``; starts at 0, never falls, ends at most at ``T``. Rows past
            its end are no sequence's: their bits and sums are 0. On CUDA wrong offsets are clamped
            and give wrong results.
        max_seqlen: length of the longest sequence; a hint, results never depend on it.
        heads: H.
        head_dim: D, a multiple of 32 up to 128.
        threshold: ``[H * D]`` int32 that the context is compared with, or None for 0.
        ties: what a context equal to its threshold becomes, as for :func:`pack_bits`.
        score_ties: ``"below"`` does not choose a key with ``S = 0``, ``"above"`` does. It has no
            meaning with ``table``.
        table: int64 ``[D + 1]``, not rising, from 0 to 2**40, see :func:`softmax_table`.
        half: half of the quantiser's step: keys with ``table[j] > half * sum(table)`` are chosen,
            compared in float64.

    Returns:
        ``words`` int32 ``[P, T, H * D / 32]``, one plane or, with ``ties="exact"``, two, and
        ``sums`` int32 ``[T]``, both as from :func:`pack_bits`.

    Raises:
        RuntimeError: shapes, dtypes, devices or ``cu_seqlens`` that do not fit.

    Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016.
    """
    if not calling.compiled("attn_binary", q):
        calling.one_device(
            "attn_binary", q, k=k, v=v, cu_seqlens=cu_seqlens, threshold=threshold, table=table
        )
        return reference_attn_binary(
            q, k, v, cu_seqlens, heads, head_dim, threshold, ties, score_ties, table, half
        )
    return calling.kernels().attn_binary(
        q, k, v, cu_seqlens, max_seqlen, heads, head_dim, threshold, ties, score_ties, table, half
    )


def softmax_table(scale: float, head_dim: int, device: torch.device | None = None) -> Tensor:
    """The ``table`` of :func:`attn_binary` for ``softmax(scale * S)``.

    Returns:
        int64 ``[head_dim + 1]``: ``round(2**40 * exp(-2 * scale * j))``. Integers, so that the sum
        of a row is exact and its order does not matter.

    Raises:
        ValueError: a scale that is not finite and positive.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(
            f"softmax_table: scale; got {scale}; need a finite positive number; try the product of "
            "the scales of q and k divided by sqrt(head_dim)"
        )
    misses = torch.arange(head_dim + 1, dtype=torch.float64, device=device)
    return (2.0**40 * (-2 * misses * scale).exp()).round().to(torch.int64)


def reference_attn_binary(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, heads: int, head_dim: int,
    threshold: Tensor | None = None, ties: str = "below", score_ties: str = "below",
    table: Tensor | None = None, half: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Meaning of :func:`filbert.ops.attn_binary`: one sequence and head after the other."""
    hidden = heads * head_dim
    counts = torch.zeros(q.shape[0], heads, head_dim, dtype=torch.int64, device=q.device)
    ends = cu_seqlens.tolist()
    signs = [
        2 * words_to_bits(t, hidden).unflatten(1, (heads, head_dim)).double() - 1 for t in (q, k, v)
    ]
    for begin, end in pairwise(ends):
        if begin == end:
            continue
        qs, ks, vs = (t[begin:end].transpose(0, 1) for t in signs)
        scores = (qs @ ks.transpose(1, 2)).long()  # [H, L, L], from -D to D in steps of two
        if table is None:
            chosen = scores >= 0 if score_ties == "above" else scores > 0
        else:
            below_best = (scores.amax(-1, keepdim=True) - scores) // 2
            weights = table[below_best]  # [H, L, L] int64
            chosen = weights.double() > half * weights.sum(-1, keepdim=True).double()
        counts[begin:end] = (chosen.double() @ vs).long().transpose(0, 1)
    words, sums = compare(counts.flatten(1), 0 if threshold is None else threshold, ties)
    words[:, ends[-1] :] = 0
    sums[ends[-1] :] = 0
    return words, sums


def _fake_attn_binary(
    q, k, v, cu_seqlens, max_seqlen, heads, head_dim, threshold=None, ties="below",
    score_ties="below", table=None, half=0.0,
):  # fmt: skip
    calling.one_device(
        "attn_binary", q, k=k, v=v, cu_seqlens=cu_seqlens, threshold=threshold, table=table
    )
    return planes_like(q, 2 if ties == "exact" else 1, q.shape[0], heads * head_dim)


def _explain_attn_binary(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any
) -> dict[str, Any]:
    bits = 32 * q.shape[1]
    lengths = [b - a for a, b in pairwise(cu_seqlens.tolist())]
    return {
        "work": f"{2 * bits * sum(n * n for n in lengths):,} multiply-adds of ±1",
        "memory": f"{4 * (q.numel() + k.numel() + 2 * v.numel()):,} bytes read and written",
    }


register(
    Operator(
        "attn_binary",
        "attention over bits",
        fake=_fake_attn_binary,
        reference=reference_attn_binary,
        explain=_explain_attn_binary,
    )
)
