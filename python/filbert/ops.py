"""One documented function per operator, and its fake (shape-only) implementation.

Every function calls ``torch.ops.filbert.<name>``, so that autograd, ``torch.compile`` and
``torch.export`` see one opaque operator. Where the compiled library is missing, the function runs
:mod:`filbert.reference` instead and says so once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _load, reference

__all__ = ["attn_varlen", "bias_gelu_", "norm_residual", "norm_residual_"]


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
        if first.device.type not in ("cpu", "meta"):
            raise RuntimeError(
                f"{op}: device; got {first.device}; need cpu, filbert has no kernels for others "
                "yet; try tensor.cpu()"
            )
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
) -> tuple[Tensor, Tensor]:
    """Fused multi-head attention over packed sequences of different lengths.

    Sequence ``s`` owns the query rows ``cu_seqlens_q[s]:cu_seqlens_q[s+1]`` and attends to the key
    rows ``cu_seqlens_k[s]:cu_seqlens_k[s+1]``, and to no others: nothing is padded, and rows of
    other sequences cannot reach its result, whatever they hold. The result of a sequence is bitwise
    the same alone and in any batch.

    Args:
        q: ``[Tq, H, D]``, float32 or bfloat16. Any strides with a contiguous last dimension, so the
            three views of one QKV buffer need no copy. ``D`` is a multiple of 8, at most 128.
        k: ``[Tk, H, D]``, dtype of ``q``.
        v: ``[Tk, H, D]``, dtype of ``q``.
        cu_seqlens_q: ``[B+1]`` int32 on the device of ``q``; starts at 0, never falls, ends at most
            at ``Tq``. Rows past its end are no sequence's: their output is 0 and their lse -inf.
        cu_seqlens_k: ``[B+1]`` int32, the same for ``k`` and ``v``.
        max_seqlen_q: length of the longest query sequence; a hint, results never depend on it.
        max_seqlen_k: length of the longest key sequence, likewise.
        scale: factor on ``q·k``, usually ``D ** -0.5``.
        alibi_slopes: ``[H]`` float32; adds ``-slope * |j - i|`` to the score of query ``i`` and key
            ``j``, counted so that the last query and the last key of a sequence coincide.
        window: ``(left, right)``: a query sees keys at most ``left`` before and ``right`` after its
            own place; ``-1`` is no bound.
        key_bias: ``[Tk]`` float32 added to every score of that key; ``-inf`` hides the key.

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
        alibi_slopes=alibi_slopes, key_bias=key_bias,
    )  # fmt: skip
    if not _compiled("attn_varlen", q):
        reference.check_attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, key_bias)
        return reference.attn_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
            alibi_slopes, window, key_bias,
        )  # fmt: skip
    return torch.ops.filbert.attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
        alibi_slopes, window[0], window[1], key_bias,
    )  # fmt: skip


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
        x: ``[T, N]`` float32 or bfloat16, contiguous rows.
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
    return torch.ops.filbert.norm_residual(x, bias, residual, weight, beta, eps)


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
    torch.ops.filbert.norm_residual_(x, bias, residual, weight, beta, eps)
    return x


def bias_gelu_(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``x = GELU(x + bias)``, in place.

    Args:
        x: ``[T, N]`` float32 or bfloat16, contiguous; overwritten.
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
    torch.ops.filbert.bias_gelu_(x, bias, approximate)
    return x


if _load.have_ops():

    @torch.library.register_fake("filbert::attn_varlen")
    def _(q, k, v, cu_q, cu_k, max_q, max_k, scale, slopes=None, left=-1, right=-1, key_bias=None):
        _one_device(
            "attn_varlen", q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            alibi_slopes=slopes, key_bias=key_bias,
        )  # fmt: skip
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        return q.new_empty(q.shape), lse

    @torch.library.register_fake("filbert::norm_residual")
    def _(x, bias, residual, weight, beta, eps):
        _one_device("norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta)
        return torch.empty_like(x)

    @torch.library.register_fake("filbert::norm_residual_")
    def _(x, bias, residual, weight, beta, eps):
        _one_device("norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta)
        return

    @torch.library.register_fake("filbert::bias_gelu_")
    def _(x, bias=None, approximate="none"):
        _one_device("bias_gelu_", x, bias=bias)
        return
