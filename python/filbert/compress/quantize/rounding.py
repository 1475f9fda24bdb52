"""Scales for a weight, and codes that are rounded to nearest.

Codes are symmetric: ``bits`` of two's complement, from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``.
Groups along the inputs share the float scale of their output and have an integer multiplier each,
as :func:`filbert.linear_grouped` computes it. Scales are chosen first, then multipliers, then codes
by the scale that this gives, so the rounding of a scale costs no more than a slightly larger step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...nn.grouped.weight import GroupedWeight
from ...ops import FIELDS, GROUP_SIZES

__all__ = ["Steps", "half_quadratic", "round_to_nearest", "steps_of"]

#: shares of the largest magnitude that are tried as the end of the range
_SHRINK = tuple(1.0 - 0.02 * i for i in range(31))
_LARGEST_SUM, _LARGEST_CODE, _LARGEST_MULTIPLIER = 2**31 - 1, 255, 255
#: a step that is none
_TINY = 1e-30


@dataclass(frozen=True)
class Steps:
    """The distance between two codes of each output and group: ``scale * multiplier``.

    Attributes:
        scale: float32 ``[N]``; negative where the codes' longer side is to be that of positive
            numbers.
        multiplier: uint8 ``[N, G]``, or None for 1.
    """

    scale: Tensor
    multiplier: Tensor | None

    def of_groups(self) -> Tensor:
        """Float32 ``[N, G]``, G is 1 without multipliers."""
        if self.multiplier is None:
            return self.scale[:, None]
        return self.scale[:, None] * self.multiplier.float()

    def weight(self, levels: Tensor, bits: int) -> GroupedWeight:
        """The weight of integers ``[N, K]``."""
        codes = (levels + (1 << (bits - 1))).to(torch.uint8)
        return GroupedWeight.from_codes(codes, bits, self.scale, self.multiplier)


def check(weight: Tensor, bits: int, group: int | None) -> None:
    """Raises ValueError for what cannot be quantized so."""
    if bits not in FIELDS:
        raise ValueError(f"bits: got {bits}, need one of {', '.join(map(str, FIELDS))}")
    if weight.ndim != 2 or not bool(weight.isfinite().all()):
        raise ValueError(f"weight: got {tuple(weight.shape)}, need [N, K] of finite numbers")
    if group is not None and (group not in GROUP_SIZES or weight.shape[1] % group):
        raise ValueError(
            f"group: got {group} for {weight.shape[1]} inputs, need one of "
            f"{', '.join(map(str, GROUP_SIZES))} that divides them, or None for all inputs"
        )


def round_to(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest integers of ``x / step`` that ``bits`` hold; 0 where the step is none."""
    half = 1 << (bits - 1)
    levels = torch.where(step.abs() > _TINY, x / step, 0.0)
    return levels.round().clamp(-half, half - 1)


def most_multiplier(inputs: int, bits: int) -> int:
    """The largest multiplier that weights are given here.

    Up to 4 bits the largest whose products with all numbers are bytes: 63, 31 and 15. A processor
    with VNNI multiplies them into the weight once and not into every sum, and a step that is 3 %
    from the best costs next to nothing, since codes are chosen after it. With 6 and 8 bits no such
    room is left; there it is the largest with which no sum can exceed int32, whatever the codes.
    """
    if bits <= 4:
        return 127 >> (bits - 1)
    most = _LARGEST_SUM // (_LARGEST_CODE * max(inputs, 1) << (bits - 1))
    return max(1, min(_LARGEST_MULTIPLIER, most))


def steps_of(
    weight: Tensor, bits: int, group: int | None = None, *, clip: bool = True,
    importance: Tensor | None = None,
) -> Steps:  # fmt: skip
    """Steps that keep the squared error of rounding small.

    Args:
        weight: float32 ``[N, K]``.
        bits: of a code.
        group: inputs of a group, or None for all.
        clip: try smaller ranges than the largest magnitude, which save more than they cost where
            few numbers are large. Without it the range is that of the largest magnitude.
        importance: ``[K]``, what the error of an input counts, or None for all alike.

    Returns:
        The best of the ranges tried, for each output and group by itself.
    """
    check(weight, bits, group)
    outputs, inputs = weight.shape
    parts = weight.float().reshape(outputs, -1, group or max(inputs, 1))
    counts = None if importance is None else importance.float().reshape(1, *parts.shape[1:])
    high = parts.amax(-1) if inputs else weight.new_zeros(outputs, 1)
    low = parts.amin(-1) if inputs else weight.new_zeros(outputs, 1)
    # The longer side of the codes goes to the side of the largest magnitude: of an output, since
    # its groups share the sign of its scale.
    turned = (high.amax(-1) > -low.amin(-1))[:, None]
    short, long = (1 << (bits - 1)) - 1, 1 << (bits - 1)
    below, above = torch.where(turned, high, -low), torch.where(turned, -low, high)
    whole = torch.maximum(below / long, above / max(short, 1)).clamp(min=0)
    best, least = whole, torch.full_like(whole, torch.inf)
    for share in _SHRINK if clip else _SHRINK[:1]:
        step = whole * share
        error = (round_to(parts, torch.where(turned, -step, step)[..., None], bits)
                 * torch.where(turned, -step, step)[..., None] - parts).square()  # fmt: skip
        total = (error if counts is None else error * counts).sum(-1)
        better = total < least
        best, least = torch.where(better, step, best), torch.where(better, total, least)
    sign = torch.where(turned, -1.0, 1.0)
    if group is None:
        return Steps((best * sign).flatten().contiguous(), None)
    return _with_multipliers(best, sign.flatten(), most_multiplier(inputs, bits))


def _with_multipliers(steps: Tensor, sign: Tensor, most: int) -> Steps:
    """``steps`` ``[N, G]`` as a scale for each output and integers up to ``most``."""
    scale = steps.amax(-1).clamp(min=0) / most
    ratio = torch.where(scale[:, None] > _TINY, steps / scale[:, None], 1.0)
    return Steps((scale * sign).contiguous(), ratio.round().clamp(1, most).to(torch.uint8))


def spread(steps: Steps, inputs: int) -> Tensor:
    """The step of every input, ``[N, K]`` or, where all inputs share it, ``[N, 1]``."""
    own = steps.of_groups()
    return own if own.shape[1] == 1 else own.repeat_interleave(inputs // own.shape[1], 1)


def round_to_nearest(
    weight: Tensor, bits: int, group: int | None = None, *, clip: bool = True,
    importance: Tensor | None = None,
) -> GroupedWeight:  # fmt: skip
    """A weight of ``bits`` by rounding to nearest; arguments of :func:`steps_of`.

    Returns:
        The quantized weight.

    Raises:
        ValueError: bits, groups or a weight that cannot be quantized so.
    """
    steps = steps_of(weight, bits, group, clip=clip, importance=importance)
    return steps.weight(round_to(weight.float(), spread(steps, weight.shape[1]), bits), bits)


def half_quadratic(
    weight: Tensor, bits: int, group: int | None = None, *, rounds: int = 20, power: float = 0.7
) -> GroupedWeight:
    """A weight of ``bits`` whose steps make the ``power``-norm of the error small, which forgives
    outliers more than squares do. Needs no data.

    Half-quadratic splitting as in HQQ: the error is split off and shrunk, and what remains is a
    least-squares problem. HQQ moves a float zero of asymmetric codes; the kernels here have
    integers, so what moves is the step.

    Args:
        weight: ``[N, K]``.
        bits: of a code.
        group: inputs of a group, or None for all.
        rounds: at most.
        power: of the norm, below 1.

    Returns:
        The quantized weight; that of :func:`round_to_nearest` where this is no better.

    Paper: HQQ, https://mobiusml.github.io/hqq_blog/.
    """
    start = steps_of(weight, bits, group)
    parts = weight.float().reshape(weight.shape[0], -1, group or max(weight.shape[1], 1))
    step = start.of_groups()[..., None]
    sign = torch.where(start.scale < 0, -1.0, 1.0)
    best, least = step, torch.full(step.shape, torch.inf)
    weighing = 10.0 / parts.abs().mean().clamp(min=_TINY)
    for _ in range(rounds):
        levels = round_to(parts, step, bits)
        error = parts - levels * step
        cost = error.abs().pow(power).sum(-1, keepdim=True)
        better = cost < least
        best, least = torch.where(better, step, best), torch.where(better, cost, least)
        size = error.abs()
        shrunk = (size - size.clamp(min=_TINY).pow(power - 1) / weighing).clamp(min=0)
        target = parts - error.sign() * shrunk
        square = levels.square().sum(-1, keepdim=True)
        step = torch.where(square > 0, (target * levels).sum(-1, keepdim=True) / square, step)
        weighing = weighing * 1.05
    found = (best.squeeze(-1) * sign[:, None]).clamp(min=0)
    if group is None:
        steps = Steps((found * sign[:, None]).flatten().contiguous(), None)
    else:
        steps = _with_multipliers(found, sign, most_multiplier(weight.shape[1], bits))
    return steps.weight(round_to(weight.float(), spread(steps, weight.shape[1]), bits), bits)
