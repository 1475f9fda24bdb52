"""Gradients that pass a rounding as if it were not there (arXiv 1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["straight_through"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor, passes: Tensor | None) -> Tensor:
        ctx.passes = passes
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad if ctx.passes is None else grad * ctx.passes), None, None


def straight_through(source: Tensor, value: Tensor, passes: Tensor | None = None) -> Tensor:
    """``value``, bit for bit, whose gradient goes to ``source`` as if it were ``source``.

    Args:
        source: what the gradient is for.
        value: the same shape and dtype; no gradient goes to it.
        passes: boolean of that shape, where the gradient passes; everywhere if not given.
    """
    return _StraightThrough.apply(source, value.detach(), passes)
