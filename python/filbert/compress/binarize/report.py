"""What :func:`filbert.binarize` has to say about a model: what was proven, and its honest size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...nn import BinaryBert
from ...nn.file import file_parts
from .equality import PartReport

__all__ = ["BinaryReport", "SizeReport", "size_of"]

#: entry names of a BinaryBert -> what they are; the first that fits counts
_KINDS = (
    (r"(^|\.)(attn_|ffn_)?norm\.(weight|bias)$", "LayerNorms"),
    (r"\.(position|token_type)$", "position and type embeddings"),
    (r"^classifier\.", "classifier"),
    (r"\.weight$", "bits of weights"),
    (r"alpha$", "scales of weights"),
    (r"bias$", "biases"),
    (r"", "thresholds and scales of activations"),
)
#: parts in which differences of the layers add up
_END_TO_END = ("whole model", "trained model")


@dataclass(frozen=True)
class SizeReport:
    """Bytes of the file that :meth:`filbert.nn.BinaryBert.save` writes, by what they are.

    Attributes:
        parts: what -> bytes; their sum is the file's size.
        original: bytes of the original's parameters in float32.
    """

    parts: dict[str, int]
    original: int

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """How many times smaller than the original it is."""
        return self.original / self.total

    def __str__(self) -> str:
        lines = [(name, f"{size:,}") for name, size in self.parts.items() if size]
        lines += [("file", f"{self.total:,}"), ("float32 original", f"{self.original:,}")]
        return _aligned([*lines, ("ratio", f"{self.ratio:.1f}")])


def size_of(model: BinaryBert, original: int) -> SizeReport:
    """The size report of ``model``, whose original has ``original`` bytes."""
    import safetensors.torch

    tensors, metadata = file_parts(model)
    parts = {name: 0 for _, name in _KINDS}
    for name, t in tensors.items():
        kind = next(kind for pattern, kind in _KINDS if re.search(pattern, name))
        parts[kind] += t.numel() * t.element_size()
    whole = len(safetensors.torch.save(tensors, metadata))
    return SizeReport({**parts, "names and settings": whole - sum(parts.values())}, original)


@dataclass
class BinaryReport:
    """How a model was binarized; a table when printed.

    Attributes:
        scheme: ``"bibert"``, ``"bit"`` or ``"binarybert"``.
        ties: what a sign makes of 0: ``"below"``, ``"above"`` or ``"exact"``.
        parts: what was compared with the eager model, at last (``trained model``) rows of a
            :class:`~filbert.compress.binarize.BinarizedBert`'s own outputs; empty with
            ``check=False``.
        weight_ties: weights at their mean, whose sign is 0 in the eager model and ±1 here; that is
            a difference also where ``ties`` is ``"exact"``.
        zero_rows: rows of weights whose scale is 0.
        size: see :class:`SizeReport`.
        notes: how else it differs from the model's own code.
    """

    scheme: str
    ties: str
    size: SizeReport
    parts: Sequence[PartReport] = ()
    weight_ties: int = 0
    zero_rows: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def mismatches(self) -> int:
        """Bits and codes that differ from the eager model's, over all parts; not the rows of the
        ``trained model``, which runs from end to end."""
        return sum(part.mismatches for part in self.parts if part.part not in _END_TO_END)

    @property
    def ties_met(self) -> int:
        """How many of the eager model's bits are 0."""
        return sum(part.ties for part in self.parts)

    @property
    def difference(self) -> float:
        """The largest difference of floats between parts on equal inputs."""
        parts = [p.difference for p in self.parts if p.part not in _END_TO_END]
        return max((d for d in parts if d is not None), default=0.0)

    def __str__(self) -> str:
        head = ("part", "compared", "zeros", "mismatches", "max difference")
        lines = [head] + [
            (p.part, f"{p.compared:,}", f"{p.ties:,}", f"{p.mismatches:,}",
             "" if p.difference is None else f"{p.difference:.1e}")
            for p in self.parts
        ]  # fmt: skip
        text = [f"{self.scheme}, ties {self.ties}"]
        text.append(_aligned(lines) if self.parts else "not compared with the eager model")
        text.append(
            f"{self.weight_ties:,} weights at their mean, {self.zero_rows:,} rows of weights with "
            "scale 0"
        )
        return "\n".join([*text, "", str(self.size), *(f"- {note}" for note in self.notes)])

    __repr__ = __str__


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
