"""How weights and activations become one bit, or a few: the quantizers of BiBERT (arXiv
2203.06390), BiT (arXiv 2205.13016) and BinaryBERT (arXiv 2012.15701).

Functions give the values and the papers' gradients; small modules hold what is learned. Two things
are explicit here. **Ties**: ``torch.sign(0)`` is 0, which no bit can hold, so every sign takes
``ties``. **Calibration**: a learned scale is NaN until a batch has set it, so that no value of it
can be mistaken for "not set yet".

In the forward pass a straight-through result is the quantized value itself. The usual spelling
``q.detach() - x.detach() + x`` is only near it, since the sum is rounded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...nn.binary.row_packer import SCALE_FLOOR, one_of
from ..gradients import straight_through

__all__ = [
    "BITS", "SCALE_FLOOR", "SCHEMES", "TIES", "ElasticBinarizer", "Quantized", "SignQuantizer",
    "UniformQuantizer", "bool_ste", "elastic_bits", "elastic_sign", "sign", "sign_ste",
    "straight_through", "uniform", "uniform_rows",
]  # fmt: skip

SCHEMES = ("bibert", "bit", "binarybert")
#: what sign(0) is: -1, +1, or 0 as in ``torch.sign``
TIES = ("below", "above", "zero")
#: widths of :class:`UniformQuantizer`
BITS = (2, 4, 8)


class Quantized(NamedTuple):
    """A quantized tensor, as a number and as an integer.

    Attributes:
        value: ``worth * codes``; gradients go through it.
        codes: whole numbers in the dtype of ``value``, without a gradient.
        worth: what 1 is worth, of a shape that broadcasts; without a gradient.
        wide: whether codes have several bits, whose ``worth`` a product is multiplied by last.
    """

    value: Tensor
    codes: Tensor
    worth: Tensor
    wide: bool = False


def sign(x: Tensor, ties: str = "zero") -> Tensor:
    """-1, 0 or +1 in the dtype of ``x``, without a gradient.

    Args:
        x: floating point, any shape.
        ties: what 0 and -0.0 become: -1 (``"below"``: +1 exactly where ``x > 0``), +1
            (``"above"``: ``x >= 0``) or 0 (``"zero"``, ``torch.sign``). NaN compares false and so
            becomes -1; with ``"zero"`` it becomes 0, as in ``torch.sign``.

    Raises:
        ValueError: an unknown ``ties``.
    """
    one_of("ties", ties, TIES)
    x = x.detach()
    if ties == "zero":
        return torch.sign(x)
    return (x > 0 if ties == "below" else x >= 0).to(x.dtype) * 2 - 1


def sign_ste(x: Tensor, ties: str = "zero") -> Tensor:
    """:func:`sign` with the gradient of ``clamp(x, -1, 1)``, which is 1 where ``|x| <= 1``."""
    return straight_through(x, sign(x, ties), x.detach().abs() <= 1)


def keep_negative(x: Tensor, source: Tensor) -> Tensor:
    """``x``, a GELU of ``source``, with its gradient, and negative wherever ``source`` is: below
    about -5.54 float32 GELU is -0.0, of which ties ``"above"`` would make +1."""
    lost = (x.detach() == 0) & (source.detach() < 0)
    return straight_through(x, x.detach().masked_fill(lost, -torch.finfo(x.dtype).tiny))


def bool_ste(x: Tensor, ties: str = "below") -> Tensor:
    """BiBERT's ``bool``: 1 where ``x > 0``, else 0 (NaN too), in the dtype of ``x``. Its gradient
    is 1 where ``|x| <= 1``. With ``ties="below"`` 0 becomes 0, as the published model computes,
    with ``"above"`` it becomes 1, as the paper's equation has it."""
    one_of("ties of bool", ties, ("below", "above"))
    kept = x.detach() > 0 if ties == "below" else x.detach() >= 0
    return straight_through(x, kept.to(x.dtype), x.detach().abs() <= 1)


class _Stepped(torch.autograd.Function):
    """``step * level`` with the gradients of a learned step size (LSQ, arXiv 1902.08153)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, value: Tensor, passes: Tensor, by_scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(passes, by_scale)
        ctx.shape = scale.shape
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad,) = grads
        passes, by_scale = ctx.saved_tensors
        return grad * passes, (grad * by_scale).sum().reshape(ctx.shape), None, None, None


def _step(scale: Tensor) -> Tensor:
    return scale.detach().clamp(min=SCALE_FLOOR)


def elastic_sign(x: Tensor, scale: Tensor, ties: str = "zero") -> Tensor:
    """``a * sign(x)`` with a learned ``a``: BiT's binarization to {-a, +a}.

    Gradients: of ``x``, 1 where ``|x| <= a``; of ``a``, ``sign(x)`` summed, as in the paper. LSQ's
    factor ``1 / sqrt(numel)`` is left out: it would count padding, and AdamW divides it out again.
    The floor of ``a`` stops no gradient.

    Args:
        x: floating point, any shape, after the learned shift.
        scale: ``a``, ``[]`` or ``[1]``; values under :data:`SCALE_FLOOR` count as it.
        ties: see :func:`sign`, for NaN too.
    """
    return _elastic_sign(x, scale, ties).value


def _elastic_sign(x: Tensor, scale: Tensor, ties: str) -> Quantized:
    step = _step(scale)
    signs = sign(x, ties)
    value = _Stepped.apply(x, scale, step * signs, x.detach().abs() <= step, signs)
    return Quantized(value, signs, step)


def elastic_bits(x: Tensor, scale: Tensor) -> Tensor:
    """``a * clamp(round(x / a), 0, 1)`` with a learned ``a``: BiT's binarization to {0, a}.

    Rounding goes to even, so the bit is 1 exactly where ``x / a > 1/2``; NaN becomes 0. Gradients,
    with ``q = x / a``: of ``x``, 1 where ``0 <= q < 1``; of ``a``, ``bit - q`` there, 0 below and 1
    above, summed and unscaled as in :func:`elastic_sign`.

    Args:
        x: floating point, any shape, after the learned shift.
        scale: ``a``, ``[]`` or ``[1]``; values under :data:`SCALE_FLOOR` count as it.
    """
    return _elastic_bits(x, scale).value


def _elastic_bits(x: Tensor, scale: Tensor) -> Quantized:
    step = _step(scale)
    level = x.detach() / step
    bits = (level > 0.5).to(x.dtype)
    inside = (level >= 0) & (level < 1)
    by_scale = torch.where(inside, bits - level, bits)
    return Quantized(_Stepped.apply(x, scale, step * bits, inside, by_scale), bits, step)


def _levels(bits: int, signed: bool) -> tuple[int, int]:
    one_of("bits", bits, BITS)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def uniform(x: Tensor, scale: Tensor, bits: int, signed: bool = True) -> Tensor:
    """``s * clamp(round(x / s), low, high)`` with one learned step ``s`` and LSQ's gradients.

    The levels are those of a two's complement (or, not ``signed``, a natural) number of ``bits``.
    The step depends on no batch, so neither does any result; BinaryBERT subtracts the minimum of
    the whole batch, which does. NaN stays NaN.

    Args:
        x: floating point, any shape.
        scale: ``s``, ``[]`` or ``[1]``; values under :data:`SCALE_FLOOR` count as it.
        bits: 2, 4 or 8.
        signed: False for inputs that are never negative.

    Raises:
        ValueError: another number of bits.
    """
    return _uniform(x, scale, bits, signed).value


def _uniform(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Quantized:
    low, high = _levels(bits, signed)
    step = _step(scale)
    level = x.detach() / step
    rounded = level.round().clamp(low, high)
    inside = (level >= low) & (level <= high)
    by_scale = torch.where(inside, rounded - level, rounded)
    value = _Stepped.apply(x, scale, step * rounded, inside, by_scale)
    return Quantized(value, rounded, step, True)


def uniform_rows(x: Tensor, bits: int, signed: bool = True) -> Tensor:
    """:func:`uniform` with a step of its own for each row ``[..., K]``: its largest ``|x|`` becomes
    the largest level. A row of zeros stays zero, a row with NaN becomes NaN. The gradient passes
    unchanged; not ``signed``, negative values become 0 and pass none."""
    return _uniform_rows(x, bits, signed).value


def _uniform_rows(x: Tensor, bits: int, signed: bool) -> Quantized:
    _, high = _levels(bits, signed)
    source = x.detach()
    top = source.abs() if signed else source.clamp(min=0)
    step = top.amax(-1, keepdim=True) / high
    step = torch.where(step == 0, 1.0, step)
    rounded = (source / step).round().clamp(-high if signed else 0, high)
    value = straight_through(x, step * rounded, None if signed else source >= 0)
    return Quantized(value, rounded, step, True)


class SignQuantizer(nn.Module):
    """:func:`sign_ste` as a module: BiBERT's activations. Nothing is learned."""

    def __init__(self, ties: str = "zero") -> None:
        super().__init__()
        one_of("ties", ties, TIES)
        self.ties = ties

    def quantize(self, x: Tensor, keep: Tensor | None = None) -> Quantized:
        """:meth:`forward` in parts; 1 is worth 1."""
        value = sign_ste(x, self.ties)
        return Quantized(value, value.detach(), x.new_ones(()))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.quantize(x, keep).value


class Scaled(nn.Module):
    """What the quantizers with one learned scale share: how that scale comes to be.

    Attributes:
        scale: ``[]``, NaN until the first batch in training mode, or a checkpoint, has set it.
    """

    #: whether there is a scale at all
    learned = True

    def __init__(self, **factory: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), math.nan, **factory))

    @property
    def calibrated(self) -> bool:
        """Whether the scale has a value."""
        return not self.learned or not bool(self.scale.detach().isnan())

    def first_scale(self, x: Tensor) -> Tensor:
        """The scale ``[]`` that the values ``x`` of the first batch ask for."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, x: Tensor, keep: Tensor | None = None) -> None:
        """Sets the scale from ``x``; where ``keep``, of its leading dimensions, is False does not
        count.

        Raises:
            ValueError: no values, or values that are not finite.
        """
        seen = x if keep is None else x[keep]
        value = self.first_scale(seen) if seen.numel() else torch.tensor(math.nan)
        if not bool(value.isfinite()):
            raise ValueError(
                f"calibration: got a scale of {float(value)} from {seen.numel()} values, need "
                "finite values; try a first batch with real tokens and a model without NaN"
            )
        self.scale.copy_(value.clamp(min=SCALE_FLOOR))

    def ready(self, x: Tensor, keep: Tensor | None) -> None:
        """Calibrates once, in training mode.

        Raises:
            RuntimeError: not calibrated in evaluation mode.
        """
        if self.calibrated:
            return
        if not self.training:
            raise RuntimeError(
                f"{type(self).__name__}: got a scale that no batch has set, need one; try "
                "calibrate(...) with a first batch, a step of training, or a checkpoint"
            )
        self.calibrate(x, keep)


class ElasticBinarizer(Scaled):
    """BiT's elastic binarization: ``a * sign(x + b)``, or with ``form="bits"`` the {0, a} form.

    The first scale is twice (``"bits"``: four times) the mean of ``|x|``, as the published training
    has it. The paper subtracts its shift where the published parameters, and these, are added.

    Args:
        channels: the length of the shift ``b``, one per channel; None for no shift.
        form: ``"sign"`` or ``"bits"``.
        ties: of the sign, see :func:`sign`; ``"bits"`` has none.
        factory: ``device`` and ``dtype``.
    """

    def __init__(
        self, channels: int | None = None, form: str = "sign", ties: str = "zero", **factory: Any
    ) -> None:
        super().__init__(**factory)
        one_of("form", form, ("sign", "bits"))
        one_of("ties", ties, TIES)
        self.form, self.ties = form, ties
        self.move: nn.Parameter | None = None
        if channels is not None:
            self.move = nn.Parameter(torch.zeros(channels, **factory))

    def first_scale(self, x: Tensor) -> Tensor:
        return (2 if self.form == "sign" else 4) * x.abs().mean()

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``x`` is ``[..., channels]``; ``keep`` boolean ``[...]``, what counts in calibration."""
        return self.quantize(x, keep).value

    def quantize(self, x: Tensor, keep: Tensor | None = None) -> Quantized:
        """:meth:`forward` in parts; 1 is worth ``a``."""
        if self.move is not None:
            x = x + self.move
        self.ready(x, keep)
        if self.form == "bits":
            return _elastic_bits(x, self.scale)
        return _elastic_sign(x, self.scale, self.ties)


class UniformQuantizer(Scaled):
    """A few bits per activation, for BinaryBERT's one-bit weights.

    Args:
        bits: 2, 4 or 8.
        signed: False for inputs that are never negative.
        mode: ``"static"``, one learned step (:func:`uniform`) that LSQ's rule sets from the first
            batch; ``"row"``, one step per row, computed at each call (:func:`uniform_rows`).
        factory: ``device`` and ``dtype``.
    """

    def __init__(
        self, bits: int = 8, signed: bool = True, mode: str = "static", **factory: Any
    ) -> None:
        super().__init__(**factory)
        one_of("mode", mode, ("static", "row"))
        self.bits, self.signed, self.mode = bits, signed, mode
        self.low, self.high = _levels(bits, signed)
        self.learned = mode == "static"
        if not self.learned:
            del self.scale

    def first_scale(self, x: Tensor) -> Tensor:
        return (2 if self.signed else 4) * x.abs().mean() / math.sqrt(self.high)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.quantize(x, keep).value

    def quantize(self, x: Tensor, keep: Tensor | None = None) -> Quantized:
        """:meth:`forward` in parts; 1 is worth a step."""
        if not self.learned:
            return _uniform_rows(x, self.bits, self.signed)
        self.ready(x, keep)
        return _uniform(x, self.scale, self.bits, self.signed)
