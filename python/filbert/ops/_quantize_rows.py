"""`quantize_rows`: rows of numbers to rows of 8-bit codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shared import calling
from .shared.operator import Operator, register

#: codes are 0 to this
HIGHEST_CODE = 255


def quantize_rows(
    x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of numbers to 8-bit codes: asymmetric uniform quantization, a range for each row.

    Code ``c`` stands for ``scale * (c - zero)``. A row's range holds 0, so 0 has a code of its own
    and padding with it changes nothing. The codes are the same on every instruction set and on
    CUDA, and a row's do not depend on other rows.

    Args:
        x: ``[T, K]`` float32 or bfloat16, on CUDA also float16; contiguous rows, any row stride.
        scale: ``[1]`` float32 of all rows, with ``zero``: static quantization. What lies outside
            is clamped. None takes each row's own range (dynamic quantization).
        zero: ``[1]`` int32 from 0 to 255, with ``scale``.

    Returns:
        ``codes`` uint8 ``[T, K]``, ``scale`` float32 ``[T]`` and ``zero`` int32 ``[T]``. A row
        that holds NaN or an infinity has the scale NaN, so that whatever follows from it is NaN.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or one of ``scale`` and ``zero``.

    Paper: Q-BERT, arXiv 1909.05840 (8-bit activations); the range of each token as in ZeroQuant,
    arXiv 2206.01861.
    """
    if not calling.compiled("quantize_rows", x):
        calling.one_device("quantize_rows", x, scale=scale, zero=zero)
        return reference_quantize_rows(x, scale, zero)
    return calling.kernels().quantize_rows(x, scale, zero)


def reference_quantize_rows(
    x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.quantize_rows`, operation by operation: codes are equal."""
    wide = torch.nn.functional.pad(x.to(torch.float32), (0, 1))  # with the 0 of the range
    bad = ~wide.isfinite().all(-1)
    low, high = torch.where(bad[:, None], 0.0, wide).aminmax(dim=-1)
    if scale is None or zero is None:
        # By a tensor: a GPU multiplies by the rounded reciprocal of a Python number instead.
        levels = torch.full_like(low, HIGHEST_CODE)
        scale = high / levels - low / levels
        zero = (-low * _inverse(scale)).clamp(max=HIGHEST_CODE).round().to(torch.int32)
    scale = torch.where(bad, torch.nan, scale)
    zero = torch.where(bad, 0, zero).to(torch.int32)
    levels = (wide[:, :-1] * _inverse(scale)[:, None]).nan_to_num(-torch.inf)
    bottom = -zero[:, None].to(torch.float32)
    codes = levels.maximum(bottom).minimum(bottom + HIGHEST_CODE).round() - bottom
    return codes.to(torch.uint8), scale, zero


def _inverse(scale: Tensor) -> Tensor:
    return torch.where((1 / scale).isfinite(), 1 / scale, 0.0)


def codes_like(x: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of so many rows, yet to be filled."""
    return (
        x.new_empty((rows, width), dtype=torch.uint8),
        x.new_empty((rows,), dtype=torch.float32),
        x.new_empty((rows,), dtype=torch.int32),
    )


def _fake_quantize_rows(x, scale=None, zero=None):
    calling.one_device("quantize_rows", x, scale=scale, zero=zero)
    return codes_like(x, *x.shape)


def _explain_quantize_rows(x: Tensor, *_: Any, **__: Any) -> dict[str, Any]:
    moved = x.numel() * (x.element_size() + 1) + 8 * x.shape[0]
    return {"memory": f"{moved:,} bytes read and written"}


register(
    Operator(
        "quantize_rows",
        "rows of numbers to rows of 8-bit codes",
        fake=_fake_quantize_rows,
        reference=reference_quantize_rows,
        explain=_explain_quantize_rows,
    )
)
