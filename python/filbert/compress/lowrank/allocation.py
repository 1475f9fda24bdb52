"""Ranks for weights under a budget: what a number of a factor keeps of the results."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from ...ops import LEAST_GAIN
from .spectrum import Spectrum

__all__ = ["RANK_STEP", "break_even", "largest_rank", "plan_ranks"]

#: ranks are multiples of this, which is a panel of a packed weight
RANK_STEP = 16


def break_even(outputs: int, inputs: int) -> float:
    """The rank from which on factors of a weight ``[outputs, inputs]`` have more numbers than it:
    614.4 for 768 and 3072, 384 for 768 and 768."""
    return outputs * inputs / (outputs + inputs)


def largest_rank(spectrum: Spectrum) -> int | None:
    """The largest multiple of 16 with which factors gain :data:`LEAST_GAIN`, or None."""
    ranks = [rank for rank in _ladder(spectrum) if rank is not None]
    return ranks[-1] if ranks else None


def plan_ranks(
    spectra: Mapping[str, Spectrum],
    *,
    param_ratio: float | None = None,
    energy: float | None = None,
) -> dict[str, int | None]:
    """A rank for each weight, or None where the weight stays as it is.

    All begin with one step of ranks. Then the step is taken that keeps most for each number it
    costs, as long as there is room; a weight's own results count relative to their size. The last
    step of a weight is the weight itself, where its factors would not gain :data:`LEAST_GAIN`.

    Args:
        spectra: of the weights, by name.
        param_ratio: numbers of all factors over numbers of all weights, between 0 and 1.
        energy: the share of its results' squares that every weight keeps at least; in the place of
            ``param_ratio``.

    Returns:
        Multiples of 16 that gain :data:`LEAST_GAIN`, or None, by the names of ``spectra``.

    Raises:
        ValueError: no budget, two of them, or one out of its range; a budget that one step for each
            weight exceeds.
    """
    if (param_ratio is None) == (energy is None):
        raise ValueError("budget: need one of param_ratio and energy")
    if energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy: got {energy}, need more than 0 and at most 1")
        return {name: _least(spectrum, energy) for name, spectrum in spectra.items()}
    assert param_ratio is not None
    if not 0 < param_ratio <= 1:
        raise ValueError(f"param_ratio: got {param_ratio}, need more than 0 and at most 1")
    ladders = {name: _ladder(spectrum) for name, spectrum in spectra.items()}
    left = param_ratio * sum(s.weight.numel() for s in spectra.values())
    left -= sum(_numbers(spectra[name], ladder[0]) for name, ladder in ladders.items())
    if left < 0:
        raise ValueError(
            f"param_ratio: got {param_ratio}, need room for ranks of {RANK_STEP}; try a larger one"
        )
    at = dict.fromkeys(spectra, 0)
    waiting = [entry for name in spectra if (entry := _next(spectra, ladders, name, 0))]
    heapq.heapify(waiting)
    while waiting:
        _, name, step = heapq.heappop(waiting)
        ladder, spectrum = ladders[name], spectra[name]
        cost = _numbers(spectrum, ladder[step]) - _numbers(spectrum, ladder[step - 1])
        if cost > left:
            continue  # a later step of this weight costs no less
        left -= cost
        at[name] = step
        if entry := _next(spectra, ladders, name, step):
            heapq.heappush(waiting, entry)
    return {name: ladders[name][step] for name, step in at.items()}


def _ladder(spectrum: Spectrum) -> list[int | None]:
    """The ranks that a weight may have, the fewest numbers first."""
    ranks = range(RANK_STEP, int(min(len(spectrum.energy), _limit(spectrum))) + 1, RANK_STEP)
    return [*ranks, None] if ranks else [None]


def _limit(spectrum: Spectrum) -> float:
    return break_even(*spectrum.weight.shape) / LEAST_GAIN


def _numbers(spectrum: Spectrum, rank: int | None) -> int:
    weight = spectrum.weight
    return weight.numel() if rank is None else rank * sum(weight.shape)


def _kept(spectrum: Spectrum, rank: int | None) -> float:
    return 1.0 if rank is None else spectrum.kept(rank)


def _next(
    spectra: Mapping[str, Spectrum], ladders: Mapping[str, list[int | None]], name: str, step: int
) -> tuple[float, str, int] | None:
    """What the step after ``step`` keeps for each number, negated; None where there is none."""
    ladder, spectrum = ladders[name], spectra[name]
    if step + 1 >= len(ladder):
        return None
    gain = _kept(spectrum, ladder[step + 1]) - _kept(spectrum, ladder[step])
    cost = _numbers(spectrum, ladder[step + 1]) - _numbers(spectrum, ladder[step])
    return (-gain / cost, name, step + 1)


def _least(spectrum: Spectrum, energy: float) -> int | None:
    return next((rank for rank in _ladder(spectrum) if _kept(spectrum, rank) >= energy), None)
