"""Products of quantized tensors: integers are multiplied and summed first and scaled last.

A sum of scaled signs is rounded at every step, and where it should be 0 it comes out a little above
or below: rounding would then decide what the next sign is. A sum of integers is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quantizers import Quantized

__all__ = ["product"]


class _Product(torch.autograd.Function):
    """``dots``, with the gradients of ``a @ b``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dots: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return dots

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        by_a = by_b = None
        if ctx.needs_input_grad[0]:
            by_a = (grads[0].to(b.dtype) @ b.mT).to(a.dtype)
        if ctx.needs_input_grad[1]:
            grad = grads[0].to(a.dtype)
            if b.ndim == 2:  # one matrix for all rows
                a, grad = a.flatten(0, -2), grad.flatten(0, -2)
            by_b = (a.mT @ grad).to(b.dtype)
        return by_a, by_b, None


def product(a: Quantized, b: Quantized) -> Tensor:
    """``(a.codes @ b.codes)`` times what both are worth, with the gradients of
    ``a.value @ b.value``, the scales' and the latent tensors' among them.

    In float32 the sum is exact up to 2^24, and is multiplied once if both worths can be multiplied
    before, as a packed layer does; a worth of ``a`` that is no single number is multiplied last.

    Args:
        a: ``[..., M, K]``; its worth ``[]`` or ``[..., M, 1]``.
        b: ``[K, N]``, or with the leading dimensions of ``a``; its worth ``[]`` or ``[N]``.
    """
    dots = a.codes @ b.codes
    scaled = dots * b.worth * a.worth if a.wide else dots * (b.worth * a.worth)
    return _Product.apply(a.value, b.value, scaled)
