"""`linear_grouped`: rows of 8-bit codes times a weight of 2, 3, 4, 6 or 8 bits, and its layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._linear_dense import ACTIVATIONS, PANEL
from ._norm_residual import reference_norm_residual
from ._quantize_rows import codes_like, reference_quantize_rows
from .shared import calling
from .shared.operator import Operator, register

#: bits of a weight -> the bits of the fields that its codes are cut into, low ones first
FIELDS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}
#: inputs of a group of the kernels
GROUP_SIZES = (32, 64, 128)
_UNIT, _QUADS = 32, 8
_LARGEST_SUM = 2**31 - 1
_LARGEST_CODE = 255


def pack_grouped(codes: Tensor, bits: int) -> Tensor:
    """The codes of a weight in the layout of :func:`linear_grouped`, which the CPU's instruction
    sets and CUDA share. ``docs/grouped.md`` has a picture of it.

    Exact: :func:`unpack_grouped` gives them back.

    Args:
        codes: uint8 ``[N, K]`` from 0 to ``2**bits - 1``; code ``c`` is the number
            ``c - 2**(bits - 1)``.
        bits: 2, 3, 4, 6 or 8.

    Returns:
        uint8 ``[ceil(N/16), ceil(K/32), 64 * bits]``: panels of 16 outputs, units of 32 inputs.
        What is not there is the number 0.

    Raises:
        ValueError: no matrix of uint8, another number of bits, or a code beyond them.
    """
    if bits not in FIELDS:
        raise ValueError(f"bits: got {bits}, need one of {', '.join(map(str, FIELDS))}")
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes: got {tuple(codes.shape)} {codes.dtype}, need uint8 [N, K]")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes: got {int(codes.max())}, need less than 2**{bits}")
    outputs, inputs = codes.shape
    missing = (0, -inputs % _UNIT, 0, -outputs % PANEL)
    whole = torch.nn.functional.pad(codes, missing, value=1 << (bits - 1))
    panels, units = whole.shape[0] // PANEL, whole.shape[1] // _UNIT
    quads = whole.view(panels, PANEL, units, _QUADS, 4).permute(0, 2, 3, 1, 4)
    quads = quads.reshape(panels, units, _QUADS, PANEL * 4)
    parts, below = [], 0
    for width in FIELDS[bits]:
        fields = quads >> below & ((1 << width) - 1)
        # Quad q is field q // width of vector q % width.
        apart = fields.view(panels, units, _QUADS // width, width, PANEL * 4)
        vectors = apart[:, :, 0].clone()
        for field in range(1, _QUADS // width):
            vectors |= apart[:, :, field] << (field * width)
        parts.append(vectors.flatten(2))
        below += width
    return torch.cat(parts, 2).contiguous()


def unpack_grouped(packed: Tensor, bits: int, outputs: int, inputs: int) -> Tensor:
    """The codes uint8 ``[outputs, inputs]`` that :func:`pack_grouped` was given.

    Args:
        packed: what :func:`pack_grouped` returned.
        bits: 2, 3, 4, 6 or 8.
        outputs: N.
        inputs: K.

    Raises:
        ValueError: a shape that :func:`pack_grouped` does not make of such codes.
    """
    panels, units = -(-outputs // PANEL), -(-inputs // _UNIT)
    if packed.shape != (panels, units, 64 * bits):
        raise ValueError(
            f"packed: got {tuple(packed.shape)}, need {(panels, units, 64 * bits)} for {bits} bits "
            f"of a weight [{outputs}, {inputs}]; try pack_grouped"
        )
    quads = packed.new_zeros((panels, units, _QUADS, PANEL * 4))
    begin = below = 0
    for width in FIELDS[bits]:
        vectors = packed[:, :, begin : begin + 64 * width].unflatten(2, (width, PANEL * 4))
        apart = quads.view(panels, units, _QUADS // width, width, PANEL * 4)
        for field in range(_QUADS // width):
            apart[:, :, field] |= (vectors >> (field * width) & ((1 << width) - 1)) << below
        begin += 64 * width
        below += width
    whole = quads.view(panels, units, _QUADS, PANEL, 4).permute(0, 3, 1, 2, 4)
    return whole.reshape(panels * PANEL, units * _UNIT)[:outputs, :inputs].contiguous()


def pack_groups(values: Tensor) -> Tensor:
    """Something of each output and group, ``[N, G]``, as :func:`linear_grouped` wants it:
    ``[ceil(N/16), G, 16]``, with zeros for outputs that are not there."""
    whole = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % PANEL))
    return whole.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, outputs: int) -> Tensor:
    """The inverse of :func:`pack_groups`."""
    return packed.transpose(1, 2).flatten(0, 1)[:outputs].contiguous()


def grouped_totals(
    codes: Tensor, bits: int, multiplier: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """The totals of a weight, which :func:`linear_grouped` needs; and the proof that no sum of it
    can exceed int32, whatever the rows.

    Args:
        codes: uint8 ``[N, K]``, as :func:`pack_grouped` takes them.
        bits: of a code.
        multiplier: uint8 ``[N, G]``, or None for 1.
        zero: the code that stands for 0, uint8 ``[N, G]``, or None for ``2**(bits - 1)``.

    Returns:
        int32 ``[N]``: the sum over all inputs of ``multiplier * (code - zero)``.

    Raises:
        ValueError: groups that do not divide K, or outputs whose sums could exceed int32.
    """
    groups = max([1] + [t.shape[1] for t in (multiplier, zero) if t is not None])
    if codes.shape[1] % groups:
        raise ValueError(
            f"groups: got {groups} of {codes.shape[1]} inputs, need a number that divides them"
        )
    apart = codes.to(torch.int64).unflatten(1, (groups, -1))
    numbers = apart - (1 << (bits - 1) if zero is None else zero.to(torch.int64).unsqueeze(-1))
    if multiplier is not None:
        numbers = numbers * multiplier.to(torch.int64).unsqueeze(-1)
    # Rows are codes less a zero: from -255 to 255, all of one sign at the worst.
    most = numbers.abs().sum((1, 2)) * _LARGEST_CODE
    if bool((most > _LARGEST_SUM).any()):
        worst = int(most.argmax())
        raise ValueError(
            f"output {worst}: its sum can reach {int(most[worst])}, need at most {_LARGEST_SUM}; "
            "try smaller multipliers with a larger scale"
        )
    return numbers.sum((1, 2)).to(torch.int32)


def grouped_offsets(zero: Tensor, bits: int, multiplier: Tensor | None = None) -> Tensor:
    """Zeros of a weight, uint8 ``[N, G]``, as the ``offset`` of :func:`linear_grouped`."""
    offset = zero.to(torch.int32) - (1 << (bits - 1))
    return pack_groups(offset if multiplier is None else offset * multiplier.to(torch.int32))


def linear_grouped(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    totals: Tensor,
    bits: int,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``act(x @ W.T + bias) + residual``, and LayerNorm of that, for a weight of a few bits.

    The product is of integers: rows of 8-bit codes with the codes of the weight, in int32, exact on
    every instruction set and on CUDA. So is the result without an activation and a LayerNorm, bit
    for bit. For row ``t``, output ``n`` and groups ``g`` of inputs::

        sum = sum over g of multiplier[n, g] * sum over k in g of (x[t, k] - x_zero[t]) * w[n, k]
        y   = float(sum) * x_scale[t] * scale[n] + bias[n]

    A group along the outputs, as in Q-BERT, is ``scale`` repeated for its outputs.

    Args:
        x: ``[T, K]``, codes of :func:`quantize_rows` (uint8), or numbers, float32 or bfloat16, on
            CUDA also float16, which become codes by each row's own range first.
        weight: uint8 of :func:`pack_grouped`.
        scale: float32 ``[N]``.
        totals: int32 ``[N]`` of :func:`grouped_totals`.
        bits: of the weight: 2, 3, 4, 6 or 8.
        x_scale: float32 ``[T]``, with codes.
        x_zero: int32 ``[T]``, with codes.
        multiplier: uint8 ``[ceil(N/16), G, 16]`` of :func:`pack_groups`, or None for 1. A group is
            ``K / G`` inputs: 32, 64, 128, or all.
        offset: int32 ``[ceil(N/16), G, 16]`` of :func:`grouped_offsets`, or None for no offsets.
        bias: float32 ``[N]``.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: ``[T, N]`` in the dtype of the result, added after the activation.
        norm_weight: ``[N]`` in the dtype of the result: LayerNorm follows, with ``norm_bias``.
        norm_bias: ``[N]``, with ``norm_weight``.
        eps: of the LayerNorm.
        dtype: of the result where x is codes; else it is that of x.

    Returns:
        ``[T, N]``. A row that held NaN or an infinity is NaN, and no other row is. With 16-bit rows
        and a LayerNorm the product is rounded before the residual is added.

    Raises:
        RuntimeError: shapes, dtypes, devices, bits or groups that do not fit.

    Paper: Q-BERT, arXiv 1909.05840.
    """
    args = (
        x, weight, scale, totals, bits, x_scale, x_zero, multiplier, offset, bias, activation,
        residual, norm_weight, norm_bias, eps,
    )  # fmt: skip
    if not calling.compiled("linear_grouped", x):
        _one_device("linear_grouped", *args)
        return reference_linear_grouped(*args, dtype)
    return calling.kernels().linear_grouped(*args, str(dtype).removeprefix("torch."))


def linear_grouped_codes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    totals: Tensor,
    bits: int,
    x_scale: Tensor | None = None,
    x_zero: Tensor | None = None,
    multiplier: Tensor | None = None,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`linear_grouped`, and codes of its result by each row's own range, for the next layer.

    Arguments and errors as there.

    Returns:
        ``rows``, what :func:`linear_grouped` returns, where a LayerNorm follows: the next layer
        needs it as residual. Else ``[0, N]``: no row of numbers is written. Then ``codes`` uint8
        ``[T, N]``, ``scale`` float32 ``[T]`` and ``zero`` int32 ``[T]`` of the result before it is
        rounded to 16 bits, as from :func:`quantize_rows`.
    """
    args = (
        x, weight, scale, totals, bits, x_scale, x_zero, multiplier, offset, bias, activation,
        residual, norm_weight, norm_bias, eps,
    )  # fmt: skip
    if not calling.compiled("linear_grouped_codes", x):
        _one_device("linear_grouped_codes", *args)
        return reference_linear_grouped_codes(*args, dtype)
    return calling.kernels().linear_grouped_codes(*args, str(dtype).removeprefix("torch."))


def _dtype_of(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if x.dtype == torch.uint8 else x.dtype


def _reference(
    x, weight, scale, totals, bits, x_scale, x_zero, multiplier, offset, bias, activation,
    residual, norm_weight, norm_bias, eps, dtype,
):  # fmt: skip
    """The result in float32, and the dtype it is asked for in."""
    del totals  # they follow from the others
    out = _dtype_of(x, dtype)
    if x_scale is None or x_zero is None:
        x, x_scale, x_zero = reference_quantize_rows(x)
    outputs, inputs = scale.shape[0], x.shape[1]
    groups = max([1] + [t.shape[1] for t in (multiplier, offset) if t is not None])
    numbers = unpack_grouped(weight, bits, outputs, inputs).to(torch.int64) - (1 << (bits - 1))
    numbers = numbers.unflatten(1, (groups, -1))
    if multiplier is not None:
        numbers = numbers * unpack_groups(multiplier, outputs).to(torch.int64).unsqueeze(-1)
    if offset is not None:
        numbers = numbers - unpack_groups(offset, outputs).to(torch.int64).unsqueeze(-1)
    codes = x.to(torch.int64) - x_zero.to(torch.int64)[:, None]
    # float64 holds the sums, and multiplies matrices on every device.
    sums = codes.double() @ numbers.flatten(1).double().T
    y = sums.to(torch.float32) * x_scale[:, None] * scale
    if bias is not None:
        y = y + bias
    y = ACTIVATIONS[activation](y)
    if norm_weight is None or norm_bias is None:
        return (y if residual is None else y + residual.to(torch.float32)), out
    y = y.to(out).to(torch.float32)
    more = None if residual is None else residual.to(torch.float32)
    return reference_norm_residual(y, None, more, norm_weight, norm_bias, eps), out


def reference_linear_grouped(
    x, weight, scale, totals, bits, x_scale=None, x_zero=None, multiplier=None, offset=None,
    bias=None, activation="none", residual=None, norm_weight=None, norm_bias=None, eps=0.0,
    dtype=torch.float32,
):  # fmt: skip
    """Meaning of :func:`filbert.ops.linear_grouped`: exact sums, then float32."""
    y, out = _reference(
        x, weight, scale, totals, bits, x_scale, x_zero, multiplier, offset, bias, activation,
        residual, norm_weight, norm_bias, eps, dtype,
    )  # fmt: skip
    return y.to(out)


def reference_linear_grouped_codes(
    x, weight, scale, totals, bits, x_scale=None, x_zero=None, multiplier=None, offset=None,
    bias=None, activation="none", residual=None, norm_weight=None, norm_bias=None, eps=0.0,
    dtype=torch.float32,
):  # fmt: skip
    """Meaning of :func:`filbert.ops.linear_grouped_codes`."""
    y, out = _reference(
        x, weight, scale, totals, bits, x_scale, x_zero, multiplier, offset, bias, activation,
        residual, norm_weight, norm_bias, eps, dtype,
    )  # fmt: skip
    rows = y.to(out) if norm_weight is not None else y.new_empty((0, y.shape[1]), dtype=out)
    return rows, *reference_quantize_rows(y)


def _one_device(
    op, x, weight, scale, totals, bits, x_scale=None, x_zero=None, multiplier=None, offset=None,
    bias=None, activation="none", residual=None, norm_weight=None, norm_bias=None, *_,
):  # fmt: skip
    del bits, activation
    calling.one_device(
        op, x, weight=weight, scale=scale, totals=totals, x_scale=x_scale, x_zero=x_zero,
        multiplier=multiplier, offset=offset, bias=bias, residual=residual,
        norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip


def _fake_linear_grouped(
    x, weight, scale, totals, bits, x_scale=None, x_zero=None, multiplier=None, offset=None,
    bias=None, activation="none", residual=None, norm_weight=None, norm_bias=None, eps=0.0,
    dtype="float32",
):  # fmt: skip
    _one_device(
        "linear_grouped", x, weight, scale, totals, bits, x_scale, x_zero, multiplier, offset,
        bias, activation, residual, norm_weight, norm_bias,
    )  # fmt: skip
    out = _dtype_of(x, getattr(torch, dtype))
    return x.new_empty((x.shape[0], scale.shape[0]), dtype=out)


def _fake_linear_grouped_codes(
    x, weight, scale, totals, bits, x_scale=None, x_zero=None, multiplier=None, offset=None,
    bias=None, activation="none", residual=None, norm_weight=None, norm_bias=None, eps=0.0,
    dtype="float32",
):  # fmt: skip
    _one_device(
        "linear_grouped_codes", x, weight, scale, totals, bits, x_scale, x_zero, multiplier,
        offset, bias, activation, residual, norm_weight, norm_bias,
    )  # fmt: skip
    rows = 0 if norm_weight is None else x.shape[0]
    outputs = scale.shape[0]
    out = _dtype_of(x, getattr(torch, dtype))
    return x.new_empty((rows, outputs), dtype=out), *codes_like(x, x.shape[0], outputs)


def _explain_linear_grouped(
    x: Tensor, weight: Tensor, scale: Tensor, totals: Tensor, bits: int, *_: Any, **named: Any
) -> dict[str, Any]:
    multiplier = named.get("multiplier")
    groups = 1 if multiplier is None else multiplier.shape[1]
    outputs = scale.shape[0]
    moved = x.numel() * x.element_size() + x.shape[0] * outputs * 4
    weights = weight.numel() + 8 * outputs + (0 if multiplier is None else multiplier.numel())
    return {
        "work": f"{2 * x.numel() * outputs:,} operations on 8-bit integers",
        "memory": f"{weights + moved:,} bytes read and written",
        "weight": f"{bits} bits, {weight.shape[0]} panels of 16 outputs, "
        + ("one scale for an output" if groups == 1 else f"{groups} groups of inputs"),
    }


register(
    Operator(
        "linear_grouped",
        "linear layer of 2, 3, 4, 6 or 8 bits over rows of 8-bit codes",
        fake=_fake_linear_grouped,
        reference=reference_linear_grouped,
        explain=_explain_linear_grouped,
    ),
    Operator(
        "linear_grouped_codes",
        "the same, with codes of its result",
        fake=_fake_linear_grouped_codes,
        reference=reference_linear_grouped_codes,
        explain=_explain_linear_grouped,
    ),
)
