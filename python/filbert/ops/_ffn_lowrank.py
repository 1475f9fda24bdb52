"""`ffn_lowrank`: a feed-forward part of low-rank factors, without its wide activations."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._linear_dense import reference_linear_dense
from ._linear_lowrank import against_dense, cut_factors
from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register

#: compute capabilities whose blocks may have more than 99 KiB
_MUCH_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))


def ffn_lowrank(
    x: Tensor,
    up_a: Tensor | None,
    up_b: Tensor,
    up_bias: Tensor | None,
    down_a: Tensor,
    down_b: Tensor | None,
    down_bias: Tensor | None,
    up_rank: int,
    inner: int,
    down_rank: int,
    outputs: int,
    activation: str = "gelu",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``act(x @ (B1 A1).T + up_bias) @ (B2 A2).T + down_bias``, residual and LayerNorm: the
    feed-forward part of a layer whose two weights are products of thin factors.

    Blocks of rows go through all four products. Of what is as wide as ``inner`` only 128 columns of
    a block exist at a time, so that working memory is a few hundred KB for each thread, whatever T.
    Nothing is computed twice. A row's result is to the bit that of four calls of
    :func:`filbert.linear_dense`, and so the same in any batch.

    Ranks may be less than the factors were packed with, as for :func:`filbert.linear_lowrank`.

    Args:
        x: ``[T, K]`` rows, float32 or bfloat16, on CUDA float16 or bfloat16; any row stride, on
            CUDA a multiple of 8. There K, I and N are multiples of 8 too.
        up_a: :func:`pack_dense` of A1 ``[R, K]``, on CUDA :func:`pad_factor` of it. All factors
            have one dtype, as :func:`filbert.linear_dense` takes it, on CUDA that of ``x``. None
            on a CPU for the identity, where R is K: the first weight is B1 alone, as that of one
            head of 64 values into a wide expander (SHRP).
        up_b: of B1 ``[I, R]``.
        up_bias: ``[I]`` in the dtype of ``x``, or None.
        down_a: of A2 ``[S, I]``.
        down_b: of B2 ``[N, S]``, or None on a CPU for the identity, where S is N.
        down_bias: ``[N]`` in the dtype of ``x``, or None.
        up_rank: R, any from 1 to that of the factors, on CUDA at most 256.
        inner: I.
        down_rank: S, likewise.
        outputs: N.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: ``[T, N]`` in the dtype of ``x``, added last, or None.
        norm_weight: ``[N]`` in the dtype of ``x``: LayerNorm follows, with ``norm_bias``.
        norm_bias: ``[N]``, with ``norm_weight``.
        eps: of the LayerNorm.

    Returns:
        ``[T, N]`` in the dtype of ``x``. Sums are float32; with bfloat16 rows what a product gives
        is rounded to bfloat16 before the next one takes it. On CUDA blocks share the inner width of
        few rows, so that a row's last bits depend on how many rows there are.

    Raises:
        RuntimeError: shapes, dtypes or factors that do not fit.

    Paper: FlashSVD, arXiv 2508.01506.
    """
    others = {
        "up_a": up_a, "up_b": up_b, "up_bias": up_bias, "down_a": down_a, "down_b": down_b,
        "down_bias": down_bias, "residual": residual, "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }  # fmt: skip
    if not calling.compiled("ffn_lowrank", x):
        calling.one_device("ffn_lowrank", x, **others)
        run: Any = reference_ffn_lowrank
    else:
        run = calling.kernels().ffn_lowrank
    result: Tensor = run(
        x, up_a, up_b, up_bias, down_a, down_b, down_bias, up_rank, inner, down_rank, outputs,
        activation, residual, norm_weight, norm_bias, eps,
    )  # fmt: skip
    return result


@cache
def most_rank(device: torch.device) -> int:
    """The largest rank of :func:`ffn_lowrank` on a GPU: 256, or 128 where a block has less than 104
    KiB of shared memory, as on all but those for data centres."""
    if device.type != "cuda":
        return 256
    return 256 if torch.cuda.get_device_capability(device) in _MUCH_SHARED_MEMORY else 128


def pad_factor(weight: Tensor) -> Tensor:
    """A factor in the layout of :func:`ffn_lowrank` on CUDA.

    Args:
        weight: ``[N, K]``, float16 or bfloat16.

    Returns:
        The same with zeros behind it, both sides multiples of 16.
    """
    outputs, inputs = weight.shape
    return F.pad(weight.detach(), (0, -inputs % 16, 0, -outputs % 16)).contiguous()


def reference_ffn_lowrank(
    x: Tensor,
    up_a: Tensor | None,
    up_b: Tensor,
    up_bias: Tensor | None,
    down_a: Tensor,
    down_b: Tensor | None,
    down_bias: Tensor | None,
    up_rank: int,
    inner: int,
    down_rank: int,
    outputs: int,
    activation: str = "gelu",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Meaning of :func:`filbert.ops.ffn_lowrank`: in float32, or wider, and one rounding."""
    y = x.to(wide_dtype(x.dtype))
    if up_a is not None:
        up_a, up_b = cut_factors(up_a, up_b, up_rank, x.shape[1], inner)
        y = reference_linear_dense(y, up_a, up_rank)
    y = reference_linear_dense(y, up_b, inner, up_bias, activation)
    follows = (down_bias, "none", residual, norm_weight, norm_bias, eps)
    if down_b is None:
        return reference_linear_dense(y, down_a, outputs, *follows).to(x.dtype)
    down_a, down_b = cut_factors(down_a, down_b, down_rank, inner, outputs)
    y = reference_linear_dense(y, down_a, down_rank)
    return reference_linear_dense(y, down_b, outputs, *follows).to(x.dtype)


def _fake_ffn_lowrank(
    x, up_a, up_b, up_bias, down_a, down_b, down_bias, up_rank, inner, down_rank, outputs,
    activation="gelu", residual=None, norm_weight=None, norm_bias=None, eps=0.0,
):  # fmt: skip
    calling.one_device(
        "ffn_lowrank", x, up_a=up_a, up_b=up_b, up_bias=up_bias, down_a=down_a, down_b=down_b,
        down_bias=down_bias, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    return x.new_empty((x.shape[0], outputs))


def _explain_ffn_lowrank(
    x: Tensor, up_a: Tensor | None, up_b: Tensor, up_bias: Tensor | None, down_a: Tensor,
    down_b: Tensor | None, down_bias: Tensor | None, up_rank: int, inner: int, down_rank: int,
    outputs: int, *_: Any, **__: Any,
) -> dict[str, Any]:  # fmt: skip
    rows, inputs = x.shape
    pairs = up_rank * (inputs * (up_a is not None) + inner)
    pairs += down_rank * (inner + outputs * (down_b is not None))
    dense = inner * (inputs + outputs)
    held = sum(t.numel() * t.element_size() for t in (up_a, up_b, down_a, down_b) if t is not None)
    return {
        "work": f"{2 * rows * pairs:,} floating-point operations, dense {2 * rows * dense:,}",
        "memory": f"{held + rows * (inputs + outputs) * x.element_size():,} bytes read and written",
        "factors": f"{up_b.dtype}, {pairs:,} numbers, dense {dense:,}",
        "against dense": against_dense(pairs, dense),
    }


register(
    Operator(
        "ffn_lowrank",
        "feed-forward part of low-rank factors, without wide activations",
        fake=_fake_ffn_lowrank,
        reference=reference_ffn_lowrank,
        explain=_explain_ffn_lowrank,
    )
)
