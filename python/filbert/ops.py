"""One documented function per operator, and its fake (shape-only) implementation.

Every function calls ``torch.ops.filbert.<name>``, so that autograd, ``torch.compile`` and
``torch.export`` see one opaque operator. Where the compiled library is missing, the function runs
:mod:`filbert.reference` instead and says so once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _load, reference

__all__ = [
    "attn_tiles",
    "attn_varlen",
    "bias_gelu_",
    "gather_rows",
    "norm_residual",
    "norm_residual_",
]


def tile_capacity(rows_q: int, sequences: int) -> int:
    """The most tiles that :func:`attn_tiles` can list; as in csrc/args/attn_tiles.h, to which the
    tests hold it."""
    return rows_q // 128 + sequences + 1


def _kernels() -> Any:
    """The operators' namespace."""
    return torch.ops.filbert


def _one_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raises unless every operand is where ``first`` is. The dispatcher alone does not notice: with
    one operand on the meta device it would run the shape-only implementation."""
    for name, t in others.items():
        if t is not None and t.device != first.device:
            raise RuntimeError(
                f"{op}: device of {name}; got {t.device}; need {first.device}, as the first "
                f"operand; try {name}.to({str(first.device)!r})"
            )


def _compiled(op: str, first: Tensor) -> bool:
    if _load.have_ops():
        if (why := _load.why_no_kernels(first.device)) is not None:
            raise RuntimeError(f"{op}: device; got {first.device}; {why}; try tensor.cpu()")
        return True
    _load.warn_once(f"filbert runs its slow reference code: {_load.missing['ops']}")
    return False


def attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    key_bias: Tensor | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused multi-head attention over packed sequences of different lengths.

    Sequence ``s`` owns the query rows ``cu_seqlens_q[s]:cu_seqlens_q[s+1]`` and attends to the key
    rows ``cu_seqlens_k[s]:cu_seqlens_k[s+1]``, and to no others: nothing is padded, and rows of
    other sequences cannot reach its result, whatever they hold. The result of a sequence is bitwise
    the same alone and in any batch.

    Args:
        q: ``[Tq, H, D]``, float32 or bfloat16, on CUDA also float16. Any strides with a contiguous
            last dimension, so the three views of one QKV buffer need no copy. ``D`` is a multiple
            of 8, at most 128.
        k: ``[Tk, H, D]``, dtype of ``q``.
        v: ``[Tk, H, D]``, dtype of ``q``.
        cu_seqlens_q: ``[B+1]`` int32 on the device of ``q``; starts at 0, never falls, ends at most
            at ``Tq``. Rows past its end are no sequence's: their output is 0 and their lse -inf.
            On CUDA nobody waits to read them: wrong offsets are clamped and give wrong results.
        cu_seqlens_k: ``[B+1]`` int32, the same for ``k`` and ``v``.
        max_seqlen_q: length of the longest query sequence; a hint, results never depend on it.
        max_seqlen_k: length of the longest key sequence, likewise.
        scale: factor on ``q·k``, usually ``D ** -0.5``.
        alibi_slopes: ``[H]`` float32; adds ``-slope * |j - i|`` to the score of query ``i`` and key
            ``j``, counted so that the last query and the last key of a sequence coincide.
        window: ``(left, right)``: a query sees keys at most ``left`` before and ``right`` after its
            own place; ``-1`` is no bound.
        key_bias: ``[Tk]`` float32 added to every score of that key; ``-inf`` hides the key.
        tiles: what :func:`attn_tiles` made of these very offsets and rows, so that the layers of
            one forward share it; made anew if not given. Rows that another list lacks are left
            unwritten. CUDA only, ignored on the CPU.

    Returns:
        ``out`` ``[Tq, H, D]`` in the dtype of ``q``, and ``lse`` ``[H, Tq]`` float32, the natural
        logarithm of the softmax denominators. A query that sees no key has ``out`` 0, ``lse`` -inf.

    Raises:
        RuntimeError: shapes, dtypes, devices or ``cu_seqlens`` that do not fit; the message says
            what, got, need and try.

    Paper: ByteTransformer, arXiv 2210.03052.
    """
    _one_device(
        "attn_varlen", q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=alibi_slopes, key_bias=key_bias, tiles=tiles,
    )  # fmt: skip
    if not _compiled("attn_varlen", q):
        reference.check_attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, key_bias)
        return reference.attn_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
            alibi_slopes, window, key_bias,
        )  # fmt: skip
    return _kernels().attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
        alibi_slopes, window[0], window[1], key_bias, tiles,
    )  # fmt: skip


def _has_tiles(cu_seqlens: Tensor) -> bool:
    """Whether the kernels that would run on ``cu_seqlens`` take a work list."""
    return cu_seqlens.device.type != "cpu" and _compiled("attn_tiles", cu_seqlens)


def attn_tiles(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows_q: int, rows_k: int) -> Tensor:
    """The work list of :func:`attn_varlen` on a GPU: every sequence in tiles of up to 128 query
    rows, those with most to do first.

    It is made on the device, without the host learning any length, and depends neither on heads nor
    on dtype: make it once for all layers of a forward.

    Args:
        cu_seqlens_q: ``[B+1]`` int32 on a CUDA device, as for :func:`attn_varlen`.
        cu_seqlens_k: ``[B+1]`` int32, likewise.
        rows_q: ``q.shape[0]``.
        rows_k: ``k.shape[0]``.

    Returns:
        ``[4 + 8 * (rows_q // 128 + B + 1)]`` int32: how many tiles have one, two and four heads to
        a block, and a zero; then eight values a tile: first query row, query rows, first key row,
        keys, the key the first query stands at, sequence, and two that mean nothing. What lies
        behind the last tile is undefined.

    Raises:
        RuntimeError: offsets that are not int32 ``[B+1]`` on one CUDA device.
    """
    _one_device("attn_tiles", cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if not _has_tiles(cu_seqlens_q):
        raise RuntimeError(
            f"attn_tiles: device; got {cu_seqlens_q.device}; need a CUDA device and filbert's CUDA "
            "kernels; try attn_varlen without tiles"
        )
    return _kernels().attn_tiles(cu_seqlens_q, cu_seqlens_k, rows_q, rows_k)


def norm_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """``LayerNorm(x + bias + residual)`` in one pass over memory.

    Args:
        x: ``[T, N]`` float32 or bfloat16, on CUDA also float16; contiguous rows.
        bias: ``[N]`` in the dtype of ``x``, or None.
        residual: ``[T, N]`` in the dtype of ``x``, or None.
        weight: ``[N]``, LayerNorm's gamma, in the dtype of ``x``.
        beta: ``[N]``, LayerNorm's beta, in the dtype of ``x``.
        eps: added to the variance; take it from the model.

    Returns:
        ``[T, N]`` in the dtype of ``x``. Sums and statistics are kept in float32, the variance is
        taken in a second pass over the row (no cancellation).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Paper: ByteTransformer, arXiv 2210.03052.
    """
    _one_device("norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta)
    if not _compiled("norm_residual", x):
        return reference.norm_residual(x, bias, residual, weight, beta, eps)
    return _kernels().norm_residual(x, bias, residual, weight, beta, eps)


def norm_residual_(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """:func:`norm_residual` written over ``x``, which it returns: no allocation, and a third less
    memory traffic, since the rows written are the rows just read. Arguments and errors as there.
    """
    _one_device("norm_residual_", x, bias=bias, residual=residual, weight=weight, beta=beta)
    if not _compiled("norm_residual_", x):
        return x.copy_(reference.norm_residual(x, bias, residual, weight, beta, eps))
    _kernels().norm_residual_(x, bias, residual, weight, beta, eps)
    return x


def bias_gelu_(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``x = GELU(x + bias)``, in place.

    Args:
        x: ``[T, N]`` float32 or bfloat16, on CUDA also float16; contiguous; overwritten.
        bias: ``[N]`` in the dtype of ``x``, or None.
        approximate: ``"none"`` for the exact erf form, ``"tanh"`` for the tanh form.

    Returns:
        ``x``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an unknown ``approximate``.
    """
    _one_device("bias_gelu_", x, bias=bias)
    if not _compiled("bias_gelu_", x):
        return reference.bias_gelu_(x, bias, approximate)
    _kernels().bias_gelu_(x, bias, approximate)
    return x


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index[t]`` of ``x`` for every ``t``, zeros where the index is no row of ``x``.

    Packing is a gather by the places of the kept tokens; unpacking is a gather by each place's
    packed row, -1 where padding was. Either way every row is written once.

    Args:
        x: ``[R, N]`` of any dtype, contiguous rows.
        index: ``[T]`` int64.

    Returns:
        ``[T, N]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    _one_device("gather_rows", x, index=index)
    if not _compiled("gather_rows", x):
        return reference.gather_rows(x, index)
    return _kernels().gather_rows(x, index)


def _fake_attn_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, scale, slopes=None, left=-1, right=-1, key_bias=None,
    tiles=None,
):  # fmt: skip
    _one_device(
        "attn_varlen", q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        alibi_slopes=slopes, key_bias=key_bias, tiles=tiles,
    )  # fmt: skip
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _fake_attn_tiles(cu_q, cu_k, rows_q, rows_k):
    _one_device("attn_tiles", cu_q, cu_seqlens_k=cu_k)
    return cu_q.new_empty(4 + 8 * tile_capacity(rows_q, cu_q.shape[0] - 1))


def _fake_norm_residual(x, bias, residual, weight, beta, eps):
    _one_device("norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_norm_residual_(x, bias, residual, weight, beta, eps):
    _one_device("norm_residual_", x, bias=bias, residual=residual, weight=weight, beta=beta)


def _fake_bias_gelu_(x, bias=None, approximate="none"):
    _one_device("bias_gelu_", x, bias=bias)


def _fake_gather_rows(x, index):
    _one_device("gather_rows", x, index=index)
    return x.new_empty((index.shape[0], x.shape[1]))


#: the shape-only implementation of every operator
FAKES: dict[str, Callable[..., Any]] = {
    "attn_tiles": _fake_attn_tiles,
    "attn_varlen": _fake_attn_varlen,
    "bias_gelu_": _fake_bias_gelu_,
    "gather_rows": _fake_gather_rows,
    "norm_residual": _fake_norm_residual,
    "norm_residual_": _fake_norm_residual_,
}

if _load.have_ops():
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"filbert::{_name}", _fake)
