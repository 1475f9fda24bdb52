"""Thresholds that stand for a whole expression, found by asking the expression itself.

A bit of a binary model is the outcome of float arithmetic: ``round((relu(x) + b) / a) >= 1``. As
long as it is monotone, it is a comparison with one number. Solving for that number would round;
bisection over the ordered float32 numbers, or over the integers a dot product can be, cannot be
wrong: it evaluates the very expression, in float32, as the eager model does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ALWAYS", "NEVER", "integer_threshold_of", "threshold_of"]

#: integer thresholds that every number reaches, and that none does
ALWAYS, NEVER = -(2**31), 2**31 - 1

_INFINITY = 0x7F800000  # the bits of float32 infinity


def first_where(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The smallest integer from ``low`` to ``high`` at which ``holds``; ``high + 1`` where none.

    ``low`` and ``high`` are int64 of one shape, and so is what ``holds`` is asked about; it answers
    with booleans that never turn back to False.
    """
    before, found = low - 1, high + 1
    while bool((still := found - before > 1).any()):
        middle = torch.div(before + found, 2, rounding_mode="floor")
        yes = holds(torch.where(still, middle, torch.minimum(found, high)))
        found = torch.where(still & yes, middle, found)
        before = torch.where(still & ~yes, middle, before)
    return found


def float_at(key: Tensor) -> Tensor:
    """The float32 number at place ``key`` (int64) of their order, in which 0.0 is at 0."""
    return torch.where(key >= 0, key, -key - 2**31).to(torch.int32).view(torch.float32)


def threshold_of(
    holds: Callable[[Tensor], Tensor], size: int, device: torch.device | None = None
) -> Tensor:
    """The smallest float32 number, for each channel, at which a monotone condition holds.

    ``x >= threshold`` is then the condition, bit for bit, for every x but NaN. Use it with
    ``ties="above"``.

    Args:
        holds: takes float32 ``[size]``, one number a channel, and gives bool ``[size]``. Once it
            holds, it must hold for all larger numbers. -0.0 is not tried, being equal to 0.0.
        size: how many channels.
        device: where.

    Returns:
        float32 ``[size]``. -inf where it always holds; NaN, which compares false, where it never
        does.
    """
    ends = torch.full((size,), _INFINITY, dtype=torch.int64, device=device)
    key = first_where(lambda k: holds(float_at(k)), -ends, ends)
    return torch.where(key > _INFINITY, torch.nan, float_at(key.clamp(max=_INFINITY)))


def integer_threshold_of(
    holds: Callable[[Tensor], Tensor],
    size: int,
    low: int,
    high: int,
    device: torch.device | None = None,
) -> Tensor:
    """The smallest integer, for each channel, at which a monotone condition holds.

    Args:
        holds: takes int64 ``[size]`` and gives bool ``[size]``; see :func:`threshold_of`.
        size: how many channels.
        low: no smaller integer occurs.
        high: no larger integer occurs.
        device: where.

    Returns:
        int32 ``[size]``; the smallest int32 where the condition always holds, the largest where it
        never does.
    """
    ends = torch.full((size,), low, dtype=torch.int64, device=device)
    found = first_where(holds, ends, ends + (high - low))
    return narrowed(found, low, high)


def narrowed(found: Tensor, low: int, high: int) -> Tensor:
    """int32 thresholds of int64 places; those at or past the ends become ALWAYS and NEVER."""
    found = torch.where(found <= low, ALWAYS, found)
    return torch.where(found > high, NEVER, found).to(torch.int32)
