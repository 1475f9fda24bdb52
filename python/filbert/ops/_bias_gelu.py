"""`bias_gelu_`: bias and GELU in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register


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
    if not calling.compiled("bias_gelu_", x):
        calling.one_device("bias_gelu_", x, bias=bias)
        return reference_bias_gelu(x, bias, approximate)
    calling.kernels().bias_gelu_(x, bias, approximate)
    return x


def reference_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """Meaning of :func:`filbert.ops.bias_gelu_`: x becomes GELU(x + bias), in place."""
    wide = wide_dtype(x.dtype)
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return x.copy_(torch.nn.functional.gelu(total, approximate=approximate))


def _fake_bias_gelu_(x, bias=None, approximate="none"):
    calling.one_device("bias_gelu_", x, bias=bias)


def _explain_bias_gelu_(
    x: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> dict[str, Any]:
    return {"memory": f"{2 * x.numel() * x.element_size():,} bytes read and written"}


register(
    Operator(
        "bias_gelu_",
        "bias + GELU in place",
        fake=_fake_bias_gelu_,
        reference=reference_bias_gelu,
        explain=_explain_bias_gelu_,
    )
)
