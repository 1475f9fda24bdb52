"""`use_rank`: a factorized model at a smaller rank, between two calls."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import nn

from ...nn.lowrank.linear import LinearLowRank

__all__ = ["use_rank"]

Model = TypeVar("Model", bound=nn.Module)
#: ranks are multiples of it, which waste nothing
STEP = 16


def use_rank(model: Model, rank: float | None) -> Model:
    """Sets how many directions of its factors each low-rank weight of ``model`` uses from now on.

    Factors are in the order of their worth, so that a model factorized once can be run at any
    smaller rank: less exact, and in less time. Nothing is computed or packed for it, and it costs
    microseconds; what files and ``revert`` take stays the whole.

    ::

        filbert.use_rank(model, 0.5)   # half of each rank
        filbert.use_rank(model, None)  # all of it again

    Args:
        model: what :func:`filbert.factorize` made, or a part of it.
        rank: up to 1.0 as a float, the share of each weight's rank, rounded up to a multiple of 16;
            as an integer the rank itself, where a weight has as many; None for all.

    Returns:
        ``model``.

    Raises:
        ValueError: a rank below 1, a share that is not in (0, 1], or no weight of low rank.
    """
    linears = [m for m in model.modules() if isinstance(m, LinearLowRank)]
    if not linears:
        raise ValueError("model: got no weight of low rank; try filbert.factorize")
    if rank is not None and not (0 < rank <= 1 if isinstance(rank, float) else rank >= 1):
        raise ValueError(f"rank: got {rank}, need a share in (0, 1], an integer from 1 on, or None")
    for linear in linears:
        if rank is None:
            linear.rank_in_use = linear.rank
        elif isinstance(rank, float):
            wanted = math.ceil(rank * linear.rank / STEP) * STEP
            linear.rank_in_use = min(wanted, linear.rank)
        else:
            linear.rank_in_use = min(rank, linear.rank)
    return model
