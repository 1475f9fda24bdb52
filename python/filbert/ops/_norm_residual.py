"""`norm_residual`: bias, residual and LayerNorm in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._quantize_rows import codes_like, reference_quantize_rows
from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register


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
    if not calling.compiled("norm_residual", x):
        calling.one_device(
            "norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta
        )
        return reference_norm_residual(x, bias, residual, weight, beta, eps)
    return calling.kernels().norm_residual(x, bias, residual, weight, beta, eps)


def norm_residual_codes(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`norm_residual`, and 8-bit codes of its result while a row is in the cache.

    Arguments and errors as there.

    Returns:
        What :func:`norm_residual` returns, then ``codes`` uint8 ``[T, N]``, ``scale`` float32
        ``[T]`` and ``zero`` int32 ``[T]`` of it before it is rounded to 16 bits, as from
        :func:`quantize_rows`.
    """
    if not calling.compiled("norm_residual_codes", x):
        calling.one_device(
            "norm_residual_codes", x, bias=bias, residual=residual, weight=weight, beta=beta
        )
        return reference_norm_residual_codes(x, bias, residual, weight, beta, eps)
    return calling.kernels().norm_residual_codes(x, bias, residual, weight, beta, eps)


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
    if not calling.compiled("norm_residual_", x):
        calling.one_device(
            "norm_residual_", x, bias=bias, residual=residual, weight=weight, beta=beta
        )
        return x.copy_(reference_norm_residual(x, bias, residual, weight, beta, eps))
    calling.kernels().norm_residual_(x, bias, residual, weight, beta, eps)
    return x


def reference_norm_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """Meaning of :func:`filbert.ops.norm_residual`: LayerNorm(x + bias + residual)."""
    wide = wide_dtype(x.dtype)
    total = x.to(wide)
    if bias is not None:
        total = total + bias.to(wide)
    if residual is not None:
        total = total + residual.to(wide)
    mean = total.mean(-1, keepdim=True)
    centred = total - mean
    variance = centred.square().mean(-1, keepdim=True)
    return (centred * (variance + eps).rsqrt() * weight.to(wide) + beta.to(wide)).to(x.dtype)


def reference_norm_residual_codes(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.norm_residual_codes`."""
    wide = reference_norm_residual(x.to(wide_dtype(x.dtype)), bias, residual, weight, beta, eps)
    return wide.to(x.dtype), *reference_quantize_rows(wide)


def _fake_norm_residual_codes(x, bias, residual, weight, beta, eps):
    calling.one_device(
        "norm_residual_codes", x, bias=bias, residual=residual, weight=weight, beta=beta
    )
    return _fake_norm_residual(x, bias, residual, weight, beta, eps), *codes_like(x, *x.shape)


def _fake_norm_residual(x, bias, residual, weight, beta, eps):
    calling.one_device("norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_norm_residual_(x, bias, residual, weight, beta, eps):
    calling.one_device("norm_residual_", x, bias=bias, residual=residual, weight=weight, beta=beta)


def _explain_norm_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, *_: Any, **__: Any
) -> dict[str, Any]:
    streams = 2 + (residual is not None)
    return {"memory": f"{streams * x.numel() * x.element_size():,} bytes read and written"}


register(
    Operator(
        "norm_residual",
        "bias + residual + LayerNorm",
        fake=_fake_norm_residual,
        reference=reference_norm_residual,
        explain=_explain_norm_residual,
    ),
    Operator(
        "norm_residual_codes",
        "the same, with codes of its result",
        fake=_fake_norm_residual_codes,
        reference=reference_norm_residual_codes,
        explain=_explain_norm_residual,
    ),
    Operator(
        "norm_residual_",
        "the same, written over its input",
        fake=_fake_norm_residual_,
        reference=reference_norm_residual,
        explain=_explain_norm_residual,
    ),
)
