"""`linear_binary` and `linear_binary_bits`: a linear layer of ±1 weights over bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _load
from ._norm_residual import reference_norm_residual
from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register
from .shared.words import codes_to_words, planes_like, tiles_to_weight, words_to_codes


def linear_binary(
    words: Tensor,
    sums: Tensor,
    weight: Tensor,
    totals: Tensor,
    alpha: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    step: int = 2,
    low: int = -1,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A linear layer whose weights are ±1 and whose inputs are bits, by AND and popcount.

    With ``x = step * code + low`` and ``w = 2 * bit - 1``, both integers,
    ``y[t, n] = scale[t] * alpha[n] * (x[t] · w[n]) + bias[n]``. The product is exact; it is made of
    ``P = sum_p 2**p popcount(plane_p & bits)`` as ``step * (2 P - sums) + low * totals``.

    Args:
        words: int32 ``[P, T, ceil(K / 32)]`` planes of codes, from :func:`pack_bits`,
            :func:`pack_codes`, :func:`linear_binary_bits` or :func:`attn_binary`; P at most 8.
        sums: int32 ``[T]``, the sum of each row's codes.
        weight: int32 ``[ceil(N / 16), ceil(K / 32), 16]``: word ``j`` of output ``16 i + l`` at
            ``[i, j, l]``; what pads K and N is 0. See :func:`filbert.nn.weight_tiles`.
        totals: int32 ``[N]``, the sum of each output's ±1 weights, ``2 * popcount - K``.
        alpha: ``[N]`` float32.
        bias: ``[N]`` float32, or None.
        scale: ``[T]`` float32, or None for 1.
        step: 2 for ±1 inputs, 1 for other codes.
        low: the integer of code 0: -1 for ±1 and for ternary codes, 0 for {0, 1}.
        residual: ``[T, N]`` in ``dtype``, added before the norm, or None.
        norm_weight: ``[N]`` in ``dtype``, gamma of a LayerNorm over the result, or None for none.
        norm_bias: ``[N]`` in ``dtype``, its beta.
        eps: its epsilon.
        dtype: of the result: float32 or bfloat16, on CUDA also float16.

    Returns:
        ``[T, N]`` in ``dtype``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
    """
    if not calling.compiled("linear_binary", words):
        calling.one_device(
            "linear_binary", words, sums=sums, weight=weight, totals=totals, alpha=alpha, bias=bias,
            scale=scale, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias,
        )  # fmt: skip
        return reference_linear_binary(
            words, sums, weight, totals, alpha, bias, scale, step, low, residual, norm_weight,
            norm_bias, eps,
        ).to(dtype)  # fmt: skip
    return calling.kernels().linear_binary(
        words, sums, weight, totals, alpha, bias, scale, step, low, residual, norm_weight,
        norm_bias, eps, str(dtype).removeprefix("torch."),
    )  # fmt: skip


def linear_binary_bits(
    words: Tensor,
    sums: Tensor,
    weight: Tensor,
    totals: Tensor,
    threshold: Tensor,
    *,
    step: int = 2,
    low: int = -1,
    until: Tensor | None = None,
    lower: Tensor | None = None,
    lower_until: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_binary` whose outputs are bits: no number of the product is ever stored.

    With ``lower`` or ``lower_until`` the outputs are codes 0, 1 and 2, how many of two bits are 1.
    An activation that falls and then rises, and whose 0 is a value of its own (GELU before
    ``torch.sign``), is so one product.

    Args:
        words: as for :func:`linear_binary`.
        sums: likewise.
        weight: likewise.
        totals: likewise.
        threshold: ``[N]`` int32. Output ``n`` is 1 where ``x[t] · w[n] >= threshold[n]``; the
            smallest int32 makes it always 1, the largest always 0.
        step: as for :func:`linear_binary`.
        low: likewise.
        until: ``[N]`` int32, or None: the output is also 1 where ``x[t] · w[n] < until[n]``.
        lower: ``[N]`` int32, or None: ``threshold`` of the second bit; the first one's if None.
        lower_until: ``[N]`` int32, or None: ``until`` of the second bit.

    Returns:
        ``words`` int32 ``[P, T, ceil(N / 32)]``, one plane or, with a second bit, two, and ``sums``
        int32 ``[T]``, the next layer's input.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016.
    """
    if not calling.compiled("linear_binary_bits", words):
        calling.one_device(
            "linear_binary_bits", words, sums=sums, weight=weight, totals=totals,
            threshold=threshold, until=until, lower=lower, lower_until=lower_until,
        )  # fmt: skip
        return reference_linear_binary_bits(
            words, sums, weight, totals, threshold, step, low, until, lower, lower_until
        )
    return calling.kernels().linear_binary_bits(
        words, sums, weight, totals, threshold, step, low, until, lower, lower_until
    )


def binary_product(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, step: int, low: int
) -> Tensor:
    """int64 ``[T, N]``: ``sum_k (step * code + low)[t, k] * (2 * bit - 1)[n, k]``."""
    features = 32 * words.shape[2]  # what pads the rows and the weight is zero in both
    codes = words_to_codes(words, features).double()
    counts = codes @ tiles_to_weight(weight, totals.shape[0], features).double().T
    return step * (2 * counts.long() - sums[:, None]) + low * totals.long()


def reference_linear_binary(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, alpha: Tensor,
    bias: Tensor | None = None, scale: Tensor | None = None, step: int = 2, low: int = -1,
    residual: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Meaning of :func:`filbert.ops.linear_binary`."""
    wide = wide_dtype(alpha.dtype)
    y = binary_product(words, sums, weight, totals, step, low).to(wide) * alpha
    if scale is not None:
        y = y * scale[:, None].to(wide)
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    if norm_weight is not None:
        assert norm_bias is not None
        y = reference_norm_residual(y, None, None, norm_weight, norm_bias, eps)
    return y


def reference_linear_binary_bits(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, threshold: Tensor,
    step: int = 2, low: int = -1, until: Tensor | None = None, lower: Tensor | None = None,
    lower_until: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Meaning of :func:`filbert.ops.linear_binary_bits`."""
    dots = binary_product(words, sums, weight, totals, step, low)

    def bit(start: Tensor, end: Tensor | None) -> Tensor:
        return (dots >= start) if end is None else (dots >= start) | (dots < end)

    codes = bit(threshold, until).long()
    if lower is None and lower_until is None:
        return codes_to_words(codes, 1)
    codes = codes + bit(threshold if lower is None else lower, lower_until).long()
    return codes_to_words(codes, 2)


def _fake_linear_binary(
    words, sums, weight, totals, alpha, bias=None, scale=None, step=2, low=-1, residual=None,
    norm_weight=None, norm_bias=None, eps=0.0, dtype="float32",
):  # fmt: skip
    calling.one_device(
        "linear_binary", words, sums=sums, weight=weight, totals=totals, alpha=alpha, bias=bias,
        scale=scale, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    return words.new_empty((words.shape[1], alpha.shape[0]), dtype=getattr(torch, dtype))


def _fake_linear_binary_bits(
    words, sums, weight, totals, threshold, step=2, low=-1, until=None, lower=None,
    lower_until=None,
):  # fmt: skip
    calling.one_device(
        "linear_binary_bits", words, sums=sums, weight=weight, totals=totals, threshold=threshold,
        until=until, lower=lower, lower_until=lower_until,
    )  # fmt: skip
    planes = 1 if lower is None and lower_until is None else 2
    return planes_like(words, planes, words.shape[1], threshold.shape[0])


def _explain_linear_binary(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, *_: Any, **__: Any
) -> dict[str, Any]:
    planes, rows, row_words = words.shape
    outputs = totals.shape[0]
    found: dict[str, Any] = {}
    if words.is_cuda:
        assert _load.C is not None
        properties = torch.cuda.get_device_properties(words.device)
        plan = _load.C.plan_linear_binary_cuda(
            rows, outputs, row_words, planes, properties.multi_processor_count,
            10 * properties.major + properties.minor,
        )  # fmt: skip
        found["counted"] = (
            "mma.m16n8k256 AND + popcount" if plan["tensor_cores"] else "__popc, no tensor cores"
        )
        found["launch"] = (
            f"{plan['blocks']:,} blocks of {plan['threads']} threads, "
            f"{plan['tile_rows']} x {plan['tile_outputs']} a block"
        )
    else:
        found["counted"] = "by vectors' population counts or byte lookups, see docs/binary.md"
    return found | {
        "work": f"{rows * outputs * row_words * 32 * planes:,} multiply-adds of ±1",
        "weight": f"{weight.numel() * 4:,} bytes, {weight.numel() * 128:,} as float32",
        "memory": f"{4 * (words.numel() + weight.numel()):,} bytes of bits read",
    }


register(
    Operator(
        "linear_binary",
        "linear layer of ±1 weights over bits",
        fake=_fake_linear_binary,
        reference=reference_linear_binary,
        explain=_explain_linear_binary,
    ),
    Operator(
        "linear_binary_bits",
        "the same with bits out",
        fake=_fake_linear_binary_bits,
        reference=reference_linear_binary_bits,
        explain=_explain_linear_binary,
    ),
)
