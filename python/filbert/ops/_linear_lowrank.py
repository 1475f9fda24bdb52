"""`linear_lowrank`: a product with a weight of two thin factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._linear_dense import pack_dense, reference_linear_dense, unpack_dense
from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register

#: How many times fewer numbers, and so multiply-adds, factors should have than the weights they
#: stand for. Both run at the same share of the processor's peak, so that factors are not slower
#: from there on; docs/lowrank.md has the measured table.
LEAST_GAIN = 1.1


def linear_lowrank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    rank: int,
    outputs: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """``act(x @ (B A).T + bias) + residual``, and LayerNorm of that.

    A block of rows goes through both products before the next one, so that what is as wide as the
    rank stays in the cache, on CUDA in shared memory. On a CPU a row's result is to the bit that of
    two calls of :func:`filbert.linear_dense`, and so the same in any batch.

    ``rank`` may be less than the factors were packed with: the first of A's rows and of B's columns
    are used, which are the best ones where :func:`filbert.factorize` made them.

    Args:
        x: ``[T, K]`` rows, float32 or bfloat16, on CUDA float16 or bfloat16; any row stride, on
            CUDA a multiple of 8. There K and N are multiples of 8 too.
        a: :func:`pack_dense` of A ``[R, K]``; dtypes as :func:`filbert.linear_dense` takes them. On
            CUDA :func:`pad_factor` of it, in the dtype of ``x``.
        b: of B ``[N, R]``, in the dtype of ``a``.
        rank: R, any from 1 to that of the factors, on CUDA at most 256.
        outputs: N.
        bias: ``[N]`` in the dtype of ``x``, or None.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: ``[T, N]`` in the dtype of ``x``, added after the activation, or None.
        norm_weight: ``[N]`` in the dtype of ``x``: LayerNorm follows, with ``norm_bias``.
        norm_bias: ``[N]``, with ``norm_weight``.
        eps: of the LayerNorm.

    Returns:
        ``[T, N]`` in the dtype of ``x``. Sums are float32; with bfloat16 rows what the first
        product gives is rounded to bfloat16.

    Raises:
        RuntimeError: shapes, dtypes or factors that do not fit.

    Paper: FlashSVD, arXiv 2508.01506.
    """
    run: Any = reference_linear_lowrank
    if calling.compiled("linear_lowrank", x):
        run = calling.kernels().linear_lowrank
    else:
        calling.one_device(
            "linear_lowrank", x, a=a, b=b, bias=bias, residual=residual, norm_weight=norm_weight,
            norm_bias=norm_bias,
        )  # fmt: skip
    result: Tensor = run(
        x, a, b, rank, outputs, bias, activation, residual, norm_weight, norm_bias, eps
    )
    return result


def reference_linear_lowrank(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    rank: int,
    outputs: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Meaning of :func:`filbert.ops.linear_lowrank`: in float32, or wider, and one rounding."""
    a, b = cut_factors(a, b, rank, x.shape[1], outputs)
    narrow = reference_linear_dense(x.to(wide_dtype(x.dtype)), a, rank)
    return reference_linear_dense(
        narrow, b, outputs, bias, activation, residual, norm_weight, norm_bias, eps
    ).to(x.dtype)


def cut_factors(
    a: Tensor, b: Tensor, rank: int, inputs: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Packed factors of ``[outputs, inputs]``, of what they are the first ``rank`` of."""
    held = b.shape[1] * (2 if b.dtype == torch.bfloat16 else 1)
    if held <= rank:
        return a, b
    first = unpack_dense(a, held, inputs)[:rank]
    return pack_dense(first), pack_dense(unpack_dense(b, outputs, held)[:, :rank])


def against_dense(pairs: int, dense: int) -> str:
    """Whether factors are worth running, for :func:`filbert.explain`."""
    gain = dense / pairs
    why = "runs as factors" if gain >= LEAST_GAIN else "the product of the factors is as fast"
    return f"{gain:.2f}x fewer operations: {why}"


def _fake_linear_lowrank(
    x, a, b, rank, outputs, bias=None, activation="none", residual=None, norm_weight=None,
    norm_bias=None, eps=0.0,
):  # fmt: skip
    calling.one_device(
        "linear_lowrank", x, a=a, b=b, bias=bias, residual=residual, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip
    return x.new_empty((x.shape[0], outputs))


def _explain_linear_lowrank(
    x: Tensor, a: Tensor, b: Tensor, rank: int, outputs: int, *_: Any, **__: Any
) -> dict[str, Any]:
    rows, inputs = x.shape
    held = sum(t.numel() * t.element_size() for t in (a, b))
    pair, dense = rank * (inputs + outputs), inputs * outputs
    return {
        "work": f"{2 * rows * pair:,} floating-point operations, dense {2 * rows * dense:,}",
        "memory": f"{held + rows * (inputs + outputs) * x.element_size():,} bytes read and written",
        "factors": f"{a.dtype}, {pair:,} numbers, dense {dense:,}",
        "against dense": against_dense(pair, dense),
    }


register(
    Operator(
        "linear_lowrank",
        "linear layer of two low-rank factors",
        fake=_fake_linear_lowrank,
        reference=reference_linear_lowrank,
        explain=_explain_linear_lowrank,
    )
)
