"""`pack_bits` and `pack_codes`: rows of numbers to planes of bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register
from .shared.words import codes_to_words, compare, planes_like, words_for


def pack_bits(
    x: Tensor, threshold: Tensor | None = None, ties: str = "below"
) -> tuple[Tensor, Tensor]:
    """Rows of numbers to rows of bits: which elements lie above a threshold.

    Args:
        x: ``[T, K]`` float32 or bfloat16, on CUDA also float16; contiguous rows, K at most 65504.
        threshold: ``[K]`` float32, or None for 0.
        ties: what an element equal to its threshold becomes. ``"below"``: bit 0; ``"above"``:
            bit 1; ``"exact"``: two planes that hold the code 0 (below), 1 (equal) or 2 (above),
            so that ``code - 1`` is ``torch.sign``. -0.0 equals 0.0. NaN lies below everything.

    Returns:
        ``words`` int32 ``[P, T, ceil(K / 32)]``, P planes of bits: bit ``k % 32`` of word
        ``k // 32``, low bits first; bits past ``K`` are 0. ``sums`` int32 ``[T]``, the sum of a
        row's codes; with one plane, its number of ones.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an unknown ``ties``.

    Paper: BiBERT, arXiv 2203.06390 (``threshold`` 0); BiT, arXiv 2205.13016 (one per channel).
    """
    if not calling.compiled("pack_bits", x):
        calling.one_device("pack_bits", x, threshold=threshold)
        return reference_pack_bits(x, threshold, ties)
    return calling.kernels().pack_bits(x, threshold, ties)


def pack_codes(
    x: Tensor, bits: int, low: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of numbers to bit planes of integer codes: uniform quantisation.

    The code of ``x`` is ``clamp(round(x * (1 / scale)), low, low + 2**bits - 1) - low``, rounded
    half to even in float32, and stands for ``scale * (code + low)``.

    Args:
        x: ``[T, K]`` float32 or bfloat16, on CUDA also float16; contiguous rows.
        bits: 2, 4 or 8, the number of planes.
        low: the integer that code 0 stands for: 0 for values that are never negative,
            ``-2**(bits - 1)`` for signed ones.
        scale: ``[T]`` float32; a row whose scale is 0, or so small (below 2**-128) that it has no
            reciprocal, gets the code of 0. None takes
            ``max|x| / (2**(bits - 1) - 1)`` over the finite elements of each row, so that a row's
            codes do not depend on other rows. NaN is coded as 0.

    Returns:
        ``words`` int32 ``[bits, T, ceil(K / 32)]`` and ``sums`` int32 ``[T]`` as from
        :func:`pack_bits`; plane ``p`` weighs ``2**p``. ``scale`` float32 ``[T]``, as used.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, another number of bits.

    Paper: BinaryBERT, arXiv 2012.15701.
    """
    if not calling.compiled("pack_codes", x):
        calling.one_device("pack_codes", x, scale=scale)
        return reference_pack_codes(x, bits, low, scale)
    return calling.kernels().pack_codes(x, bits, low, scale)


def reference_pack_bits(
    x: Tensor, threshold: Tensor | None = None, ties: str = "below"
) -> tuple[Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.pack_bits`."""
    wide = x.to(wide_dtype(x.dtype))
    return compare(wide, 0.0 if threshold is None else threshold.to(wide.dtype), ties)


def reference_pack_codes(
    x: Tensor, bits: int, low: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.pack_codes`."""
    wide = x.to(wide_dtype(x.dtype))
    if scale is None:
        largest = torch.nn.functional.pad(wide.nan_to_num(0.0, 0.0, 0.0).abs(), (0, 1)).amax(-1)
        # By a tensor: a GPU multiplies by the rounded reciprocal of a Python number instead.
        scale = largest / torch.full_like(largest, 2 ** (bits - 1) - 1)
    # A multiplication by the reciprocal, as the kernels do it, so that both round alike.
    inverse = torch.where((1 / scale).isfinite(), 1 / scale, 0.0).to(wide.dtype)
    levels = (wide * inverse[:, None]).nan_to_num(0.0, 2.0**30, -(2.0**30)).round()
    codes = (levels.clamp(low, low + 2**bits - 1) - low).long()
    return *codes_to_words(codes, bits), scale.to(torch.float32).expand(x.shape[0]).contiguous()


def _fake_pack_bits(x, threshold=None, ties="below"):
    calling.one_device("pack_bits", x, threshold=threshold)
    return planes_like(x, 2 if ties == "exact" else 1, *x.shape)


def _fake_pack_codes(x, bits, low, scale=None):
    calling.one_device("pack_codes", x, scale=scale)
    return *planes_like(x, bits, *x.shape), x.new_empty((x.shape[0],), dtype=torch.float32)


def _explain_pack(x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
    planes = args[0] if args and isinstance(args[0], int) else kwargs.get("bits", 1)
    planes = 2 if "exact" in (*args, kwargs.get("ties")) else planes
    written = x.shape[0] * (4 * planes * words_for(x.shape[1]) + 4)
    return {"memory": f"{x.numel() * x.element_size() + written:,} bytes read and written"}


register(
    Operator(
        "pack_bits",
        "rows of numbers to rows of bits",
        fake=_fake_pack_bits,
        reference=reference_pack_bits,
        explain=_explain_pack,
    ),
    Operator(
        "pack_codes",
        "rows of numbers to bit planes of 2, 4 or 8 bits",
        fake=_fake_pack_codes,
        reference=reference_pack_codes,
        explain=_explain_pack,
    ),
)
