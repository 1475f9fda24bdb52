"""The check that comes before every timing: is the answer right?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: what the error means, printed under every table
MEASURE = "largest over rows of |row - reference row| / |reference row|"


@dataclass(frozen=True)
class Check:
    """The outcome of comparing one contestant with the reference."""

    error: float
    tolerance: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        # Written so that a NaN error fails.
        return not self.reason and self.error <= self.tolerance


def row_error(got: Tensor, reference: Tensor) -> float:
    """The error of the worst row, relative to that row; inf if anything is not finite.

    A maximum over rows, not a mean: one sequence that reads its neighbour must not hide among
    thousands of good rows.

    Args:
        got: ``[..., N]`` of any float dtype.
        reference: the same shape, float32 or float64.
    """
    reference = reference.detach().double()
    got = got.detach().to(reference.device).double()
    if got.numel() == 0:
        return 0.0
    if not bool(torch.isfinite(got).all()):
        return math.inf
    size = torch.linalg.vector_norm(reference, dim=-1)
    distance = torch.linalg.vector_norm(got - reference, dim=-1)
    return float((distance / size.clamp_min(torch.finfo(torch.float64).tiny)).max())


def check(got: Tensor, reference: Tensor, tolerance: float) -> Check:
    """Compares ``got`` with ``reference`` and says in words what is wrong."""
    if got.shape != reference.shape:
        reason = f"wrong shape: got {tuple(got.shape)}, need {tuple(reference.shape)}"
        return Check(math.inf, tolerance, reason)
    error = row_error(got, reference)
    if error <= tolerance:
        return Check(error, tolerance)
    what = "values that are not finite" if math.isinf(error) else f"error {error:.2g}"
    return Check(error, tolerance, f"wrong result: {what}, tolerance {tolerance:.0e}")
