"""What an error of each output of a linear layer costs: the diagonal of the Fisher information, row
by row.

Paper: FWSVD, arXiv 2207.00112.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Sample

__all__ = ["Loss", "output_fisher"]

#: what a call of the model returned -> a scalar
Loss = Callable[[Any], Tensor]


def output_fisher(
    linears: Sequence[nn.Linear],
    samples: Sequence[Sample],
    call: Callable[[Sample], Any],
    loss: Loss,
) -> dict[nn.Linear, Tensor]:
    """The squares of a loss's gradients by the weights of each output, summed over inputs and
    samples.

    Args:
        linears: of one model in eval mode, not converted.
        samples: texts, or arguments of the model with the labels that it wants.
        call: of :func:`filbert.compress.calibration.caller_of`.
        loss: of what the call returned.

    Returns:
        Layer to float64 ``[N]``.

    Raises:
        ValueError: no sample, or a loss that has no gradient by a layer's weight.

    Paper: FWSVD, arXiv 2207.00112.
    """
    if not samples:
        raise ValueError("calibration: got no sample, need some with what the loss is made of")
    weights = [linear.weight for linear in linears]
    flags = [weight.requires_grad for weight in weights]
    found = [torch.zeros(len(w), dtype=torch.float64, device=w.device) for w in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for sample in samples:
                gradients = torch.autograd.grad(loss(call(sample)), weights, allow_unused=True)
                for total, gradient in zip(found, gradients, strict=True):
                    if gradient is None:
                        raise ValueError("loss: does not depend on every layer of the encoders")
                    total += gradient.double().square().sum(1)
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return dict(zip(linears, found, strict=True))
