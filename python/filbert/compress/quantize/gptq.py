"""Codes that make the error of a layer's *results* small on calibration rows.

Paper: GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...nn.grouped.weight import GroupedWeight
from .rounding import Steps, round_to, spread, steps_of

__all__ = ["gptq"]

_BLOCK = 128


def gptq(
    weight: Tensor, moments: Tensor, bits: int, group: int | None = None, *, damping: float = 0.01,
    passes: int = 10,
) -> GroupedWeight:  # fmt: skip
    """A weight of ``bits``: inputs are rounded one after the other, and what rounding one did to
    the results is made good by those that follow.

    Inputs with large moments come first, since nothing follows the last ones. Then every input is
    rounded again, the best for what the others have become, and each output's scale is fitted to
    its codes, a few times over.

    Args:
        weight: ``[N, K]``.
        moments: ``X.T @ X`` ``[K, K]`` of the layer's input rows, padding excluded.
        bits: of a code.
        group: inputs of a group, or None for all. Steps are chosen before, by the diagonal of
            ``moments``.
        damping: the share of the diagonal's mean that is added to it.
        passes: over all inputs after the first.

    Returns:
        The quantized weight.

    Raises:
        ValueError: shapes, bits or groups that do not fit.

    Paper: GPTQ, arXiv 2210.17323; QuantEase, arXiv 2309.01885 (the passes after the first).
    """
    outputs, inputs = weight.shape
    if moments.shape != (inputs, inputs):
        raise ValueError(f"moments: got {tuple(moments.shape)}, need [{inputs}, {inputs}]")
    diagonal = moments.diagonal().double()
    steps = steps_of(weight, bits, group, importance=diagonal.clamp(min=0).float())
    step = spread(steps, inputs).expand(outputs, inputs)
    # An input that was never seen is worth nothing, and must not be divided by.
    floor = (damping * diagonal.mean()).clamp(min=1e-12)
    order = diagonal.argsort(descending=True)
    damped = moments.double() + torch.eye(inputs, dtype=torch.float64) * floor
    damped = damped[order][:, order]
    # Row i of the upper factor of the inverse says how the error of input i moves those after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float()[:, order].clone()
    step = step[:, order]
    levels = torch.empty_like(left)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        block, errors = left[:, begin:end], torch.empty(outputs, end - begin)
        for i in range(begin, end):
            at = i - begin
            levels[:, i] = round_to(block[:, at], step[:, i], bits)
            error = (block[:, at] - levels[:, i] * step[:, i]) / factor[i, i]
            block[:, at + 1 :] -= error[:, None] * factor[i, i + 1 : end]
            errors[:, at] = error
        left[:, end:] -= errors @ factor[begin:end, end:]
    back = torch.empty_like(levels)
    back[:, order] = levels
    damped = damped[order.argsort()][:, order.argsort()].float()
    for _ in range(passes):
        back = _descend(weight.float(), back, spread(steps, inputs), damped, bits)
        steps = _refitted(weight.float(), back, steps, damped)
    return steps.weight(back, bits)


def _descend(weight: Tensor, levels: Tensor, step: Tensor, products: Tensor, bits: int) -> Tensor:
    """Rounds each input again, the best for what all others are now."""
    step = step.expand_as(levels)
    # What is left of the weight, times the moments: kept up to date as levels change.
    left = (weight - levels * step) @ products
    levels = levels.clone()
    for k in range(levels.shape[1]):
        best = levels[:, k] * step[:, k] + left[:, k] / products[k, k]
        level = round_to(best, step[:, k], bits)
        change = (level - levels[:, k]) * step[:, k]
        left -= change[:, None] * products[k]
        levels[:, k] = level
    return levels


def _refitted(weight: Tensor, levels: Tensor, steps: Steps, products: Tensor) -> Steps:
    """The scale of each output that its levels fit best."""
    unit = levels * spread(Steps(torch.ones_like(steps.scale), steps.multiplier), levels.shape[1])
    seen = unit @ products
    size = (seen * unit).sum(-1)
    scale = torch.where(size > 0, (seen * weight).sum(-1) / size, steps.scale)
    return Steps(scale.contiguous(), steps.multiplier)
