"""What :func:`filbert.quantize` made of each weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ...conversion.hugging_face.holders import module_of

__all__ = ["QuantizationReport", "QuantizedRow", "quantization_report"]

_reports: WeakKeyDictionary[nn.Module, QuantizationReport] = WeakKeyDictionary()


def error_of(new: Tensor, old: Tensor) -> float:
    """``|new - old| / |old|``"""
    wide = old.float()
    return float((new.float() - wide).norm() / wide.norm().clamp(min=1e-30))


@dataclass(frozen=True)
class QuantizedRow:
    """One weight.

    Attributes:
        name: of the linear layer in the model.
        bits: of a code.
        group: inputs of a group, or None for all.
        bytes: of codes, scales and multipliers.
        error: of the weight, ``|new - old| / |old|``.
        of_results: of the layer's results on the calibration rows, likewise; None without them.
    """

    name: str
    bits: int
    group: int | None
    bytes: int
    error: float
    of_results: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """The rows of :func:`quantization_report`, which prints as a table.

    Attributes:
        rows: in the order of the model.
        method: how codes were chosen.
    """

    rows: list[QuantizedRow]
    method: str

    def attach(self, model: nn.Module) -> None:
        """Makes it the report of ``model``."""
        _reports[model] = self

    def __iter__(self) -> Iterator[QuantizedRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all quantized weights."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=4)
        lines = [f"{'name':<{width}}  bits  group      bytes   error  of results"]
        for row in self.rows:
            group = "all" if row.group is None else str(row.group)
            result = "-" if row.of_results is None else f"{row.of_results:.4f}"
            lines.append(
                f"{row.name:<{width}}  {row.bits:>4}  {group:>5}  {row.bytes:>9,}  {row.error:.4f}"
                f"  {result:>10}"
            )
        lines.append(f"{len(self.rows)} weights by {self.method}, {self.nbytes:,} bytes")
        return "\n".join(lines)


def quantization_report(model: Any) -> QuantizationReport:
    """What :func:`filbert.quantize` made of each weight of ``model``.

    Raises:
        ValueError: a model that was not quantized in this process.
    """
    module = module_of(model, "quantization_report")
    if module not in _reports:
        raise ValueError("quantization_report: this model was not quantized here")
    return _reports[module]
