"""What became of each weight of a factorized model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ...conversion.hugging_face.holders import module_of
from .spectrum import Spectrum

__all__ = ["FactorizationReport", "FactorizedRow", "factorization_report"]

_reports: WeakKeyDictionary[nn.Module, FactorizationReport] = WeakKeyDictionary()


@dataclass(frozen=True)
class FactorizedRow:
    """One weight.

    Attributes:
        name: of its linear layer, or of the first of several that are one weight.
        outputs, inputs: N and K.
        rank: R, or None where the weight stayed as it is.
        kept: the share of its results' squares on calibration rows, or of its own without any.
        as_product: whether the factors' product runs in their place, as a dense weight.
    """

    name: str
    outputs: int
    inputs: int
    rank: int | None
    kept: float
    as_product: bool = False

    @classmethod
    def of(cls, name: str, spectrum: Spectrum, rank: int | None, as_product: bool) -> FactorizedRow:
        """That of a weight and the rank that was chosen for it."""
        kept = 1.0 if rank is None else spectrum.kept(rank)
        outputs, inputs = spectrum.weight.shape
        return cls(name, outputs, inputs, rank, kept, as_product)

    @property
    def dense_numbers(self) -> int:
        """N K"""
        return self.outputs * self.inputs

    @property
    def numbers(self) -> int:
        """R (N + K), or N K: also the multiply-adds of a row."""
        if self.rank is None or self.as_product:
            return self.dense_numbers
        return self.rank * (self.outputs + self.inputs)

    @property
    def runs(self) -> str:
        """How it runs, and why."""
        if self.rank is None:
            return "dense: as it was"
        pair = self.rank * (self.outputs + self.inputs)
        times = f"{self.dense_numbers / pair:.2f}x fewer operations"
        return f"dense product: only {times}" if self.as_product else f"factors: {times}"


class FactorizationReport:
    """Rows for all weights; prints as a table."""

    def __init__(self, rows: Sequence[FactorizedRow]) -> None:
        self.rows = tuple(rows)

    @property
    def param_ratio(self) -> float:
        """Numbers over those of the dense weights; also the share of multiply-adds that is left."""
        return sum(row.numbers for row in self.rows) / sum(row.dense_numbers for row in self.rows)

    def attach(self, model: nn.Module) -> None:
        """Makes it the report of ``model``."""
        _reports[model] = self

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        head = f"{'weight':<{width}}  {'shape':>11}  {'rank':>5}  {'numbers':>11}  {'kept':>7}"
        lines = [f"{head}  runs as"]
        for row in self.rows:
            shape = f"{row.outputs}x{row.inputs}"
            rank = "dense" if row.rank is None else str(row.rank)
            lines.append(
                f"{row.name:<{width}}  {shape:>11}  {rank:>5}  {row.numbers:>11,}  {row.kept:>7.2%}"
                f"  {row.runs}"
            )
        lines.append(f"{self.param_ratio:.1%} of the numbers and of the multiply-adds")
        return "\n".join(lines)


def factorization_report(model: Any) -> FactorizationReport:
    """What :func:`filbert.factorize` made of each weight of ``model``.

    Raises:
        ValueError: a model that was not factorized here.
    """
    module = module_of(model, "factorization_report")
    if module not in _reports:
        raise ValueError("factorization_report: this model was not factorized here")
    return _reports[module]
