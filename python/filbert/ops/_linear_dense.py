"""`linear_dense`: a dense product on a CPU with a fused epilogue, and its packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._norm_residual import reference_norm_residual
from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register

_DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: outputs that lie side by side in a packed dense weight
PANEL = 16
#: activations of linear_dense
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def pack_dense(weight: Tensor) -> Tensor:
    """A dense weight in the layout of :func:`linear_dense`, which every instruction set shares.

    Exact: :func:`unpack_dense` gives it back bit for bit.

    Args:
        weight: ``[N, K]``, float32, float16 or bfloat16.

    Returns:
        ``[ceil(N/16), K, 16]``: panels of 16 outputs that lie side by side, with zeros for outputs
        that are not there. bfloat16 lies in pairs of inputs, ``[ceil(N/16), ceil(K/2), 16, 2]``.

    Raises:
        ValueError: no matrix of these dtypes.
    """
    if weight.ndim != 2 or weight.dtype not in _DENSE_DTYPES:
        raise ValueError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}, need [N, K] of float32, float16 or "
            "bfloat16"
        )
    outputs, inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    missing = (0, -inputs % pair, 0, -outputs % PANEL)
    whole = torch.nn.functional.pad(weight.detach(), missing)
    count, steps = whole.shape[0] // PANEL, whole.shape[1] // pair
    panels = whole.view(count, PANEL, steps, pair).transpose(1, 2)
    return (panels if pair == 2 else panels.squeeze(-1)).contiguous()


def unpack_dense(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight ``[outputs, inputs]`` that :func:`pack_dense` was given, bit for bit.

    Args:
        packed: what :func:`pack_dense` returned.
        outputs: N.
        inputs: K.

    Raises:
        ValueError: a shape that :func:`pack_dense` does not make of such a weight.
    """
    pair = 2 if packed.dtype == torch.bfloat16 else 1
    panels = -(-outputs // PANEL)
    need = [panels, -(-inputs // pair), PANEL] + [2] * (pair == 2)
    if list(packed.shape) != need:
        raise ValueError(
            f"packed: got {tuple(packed.shape)} {packed.dtype}, need {tuple(need)} for a weight "
            f"[{outputs}, {inputs}]; try pack_dense"
        )
    whole = packed if packed.ndim == 4 else packed.unsqueeze(-1)  # [panels, steps, 16, pair]
    whole = whole.transpose(1, 2).reshape(panels * PANEL, packed.shape[1] * pair)
    own = whole.shape == (outputs, inputs)  # else a view of more than is there
    return (
        whole.contiguous()
        if own
        else whole[:outputs, :inputs].clone(memory_format=torch.contiguous_format)
    )


def linear_dense(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``act(x @ W.T + bias) + residual``, and LayerNorm of that: a dense product on a CPU.

    A row's sum has one order, whatever the other rows, their number and the threads. So a row's
    result is bitwise the same alone, in any batch and at any place of it, on one instruction set.

    Args:
        x: ``[T, K]`` rows, float32 or bfloat16; any row stride.
        weight: of :func:`pack_dense`. float32, float16 or bfloat16 with float32 rows, which 16-bit
            weights are widened to; bfloat16 with bfloat16 rows.
        outputs: N.
        bias: ``[N]`` in the dtype of ``x``.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: ``[T, N]`` in the dtype of ``x``, added after the activation.
        norm_weight: ``[N]`` in the dtype of ``x``: LayerNorm follows, with ``norm_bias``.
        norm_bias: ``[N]``, with ``norm_weight``.
        eps: of the LayerNorm.

    Returns:
        ``[T, N]`` in the dtype of ``x``. Sums are float32. With bfloat16 rows and a LayerNorm the
        product is rounded to bfloat16 before the residual is added.

    Raises:
        RuntimeError: shapes, dtypes or a weight that do not fit, or CUDA tensors.

    Paper: ByteTransformer, arXiv 2210.03052 (the fused epilogues).
    """
    others = {
        "weight": weight, "bias": bias, "residual": residual, "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }  # fmt: skip
    if x.is_cuda:
        raise RuntimeError(
            f"linear_dense: device; got {x.device}; need cpu; try torch.nn.functional.linear, "
            "which is cuBLASLt there"
        )
    if not calling.compiled("linear_dense", x):
        calling.one_device("linear_dense", x, **others)
        return reference_linear_dense(
            x, weight, outputs, bias, activation, residual, norm_weight, norm_bias, eps
        )
    return calling.kernels().linear_dense(
        x, weight, outputs, bias, activation, residual, norm_weight, norm_bias, eps
    )


def reference_linear_dense(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Meaning of :func:`filbert.ops.linear_dense`: sums in float32, or wider, and one rounding."""
    wide = wide_dtype(x.dtype)
    y = x.to(wide) @ unpack_dense(weight, outputs, x.shape[1]).to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.to(wide)
    if norm_weight is None or norm_bias is None:
        return y.to(x.dtype)
    return reference_norm_residual(y, None, None, norm_weight, norm_bias, eps).to(x.dtype)


def _fake_linear_dense(
    x, weight, outputs, bias=None, activation="none", residual=None, norm_weight=None,
    norm_bias=None, eps=0.0,
):  # fmt: skip
    calling.one_device(
        "linear_dense", x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip
    return x.new_empty((x.shape[0], outputs))


def _explain_linear_dense(
    x: Tensor, weight: Tensor, outputs: int, *_: Any, **__: Any
) -> dict[str, Any]:
    moved = (x.numel() + x.shape[0] * outputs) * x.element_size()
    return {
        "work": f"{2 * x.numel() * outputs:,} floating-point operations",
        "memory": f"{weight.numel() * weight.element_size() + moved:,} bytes read and written",
        "weight": f"{weight.dtype}, {weight.shape[0]} panels of 16 outputs",
    }


register(
    Operator(
        "linear_dense",
        "linear layer of floats, with what follows it",
        fake=_fake_linear_dense,
        reference=reference_linear_dense,
        explain=_explain_linear_dense,
        devices=("cpu",),
    )
)
