"""What :func:`filbert.report` gives: one row per module, printable as an aligned table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import takewhile

import torch
from torch import nn

from .. import _load
from ..nn.grouped.embedding import EmbeddingGrouped
from .swap import SwappedEncoder

__all__ = ["Report", "ReportRow", "left_alone", "rows_of_encoder"]


@dataclass(frozen=True)
class ReportRow:
    """One module, or the same module of every layer.

    Attributes:
        name: its name in the model; ``{0..11}`` stands for those layers.
        was: its class before.
        now: what it is now.
        kernel: what runs it on this machine.
        bytes: of its weights as they are held now, over all layers it stands for.
        reason: why it is what it is, or was left alone.
    """

    name: str
    was: str
    now: str
    kernel: str
    bytes: int
    reason: str


class Report:
    """The rows of :func:`filbert.report`: iterable, indexable, and a table when printed."""

    def __init__(self, rows: list[ReportRow]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ReportRow:
        return self.rows[index]

    def __str__(self) -> str:
        names = [field.name for field in fields(ReportRow)]
        table = [names] + [[_cell(getattr(row, name)) for name in names] for row in self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(names))]
        lines = []
        for line in table:
            cells = [
                cell.rjust(width) if name == "bytes" else cell.ljust(width)
                for cell, width, name in zip(line, widths, names, strict=True)
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    __repr__ = __str__


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def kernels_for(device: torch.device) -> str:
    """Which of filbert's kernels run on ``device``, in a word or two."""
    if device.type != "cuda":
        return _load.isa()
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda sm_{major}{minor}"


def rows_of_encoder(name: str, encoder: SwappedEncoder) -> list[ReportRow]:
    """The rows of one converted encoder; layers that read the same are one row."""
    original = type(encoder.original).__name__
    if not encoder.is_packed:
        reason = "; ".join(encoder.refusals)
        return [ReportRow(name, original, "not runnable", "none", 0, reason)]
    weight = encoder.linears[0][0].weight
    ours = kernels_for(weight.device)
    why = "" if _load.have_ops() else _load.missing["ops"]
    rows: list[ReportRow] = []
    for index, layer in enumerate(encoder.layers):
        names = encoder.part_names[index]
        where = f"{name}.{encoder.list_name}.{index}"
        for parts, linear in layer.linears():
            rows.append(
                ReportRow(
                    f"{where}.{_join([names[p] for p in parts])}",
                    "Linear" if len(parts) == 1 else f"{len(parts)} x Linear",
                    type(linear).__name__,
                    linear.kernel,
                    linear.nbytes,
                    linear.reason,
                )
            )
        activation = layer.feed_forward.activation
        if activation is not None:
            kind = getattr(activation, "__name__", type(activation).__name__)
            rows.append(
                ReportRow(f"{where} (activation)", kind, kind, "eager", 0, "not a form of GELU")
            )
        rows.append(
            ReportRow(f"{where} (attention)", "padded attention", "packed attention",
                      f"{layer.attention.kernel} {ours}", 0, why)
        )  # fmt: skip
        size = encoder.compute_dtype.itemsize * encoder.hidden_size
        for norm, linear in (("attn_norm", layer.out), ("ffn_norm", layer.feed_forward.down)):
            rows.append(
                ReportRow(f"{where}.{names[norm]}", "LayerNorm", "residual + LayerNorm",
                          f"{linear.norm_kernel} {ours}", 2 * size, why)
            )  # fmt: skip
    head = ReportRow(
        name,
        original,
        type(encoder).__name__,
        f"rows {str(encoder.compute_dtype).removeprefix('torch.')}",
        sum(row.bytes for row in rows),
        f"packed once for {len(encoder.layers)} layers; rows outside the mask: "
        + {"zero": "zeros", "compute": "computed, not packed"}[encoder.masked_rows],
    )
    return [head, *_merge_layers(rows, f"{name}.{encoder.list_name}.")]


def left_alone(name: str, module: nn.Module, reason: str) -> ReportRow:
    """The row of a module that was not converted."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    tables = [m for m in module.modules() if isinstance(m, EmbeddingGrouped)]
    kinds = dict.fromkeys(table.kernel for table in tables)
    kind = type(module).__name__
    return ReportRow(
        name, kind, kind, ", ".join(["torch", *kinds]), size + sum(t.nbytes for t in tables), reason
    )


def _join(names: list[str]) -> str:
    """``a.query, a.key`` as ``a.{query,key}``."""
    if len(names) == 1:
        return names[0]
    head = names[0].rpartition(".")[0]
    tails = [n.rpartition(".")[2] for n in names]
    return f"{head}.{{{','.join(tails)}}}" if head else f"{{{','.join(tails)}}}"


def _merge_layers(rows: list[ReportRow], prefix: str) -> list[ReportRow]:
    """One row for all layers in which a module reads the same."""
    merged: dict[tuple[str, ...], tuple[list[int], list[ReportRow]]] = {}
    for row in rows:
        tail = row.name.removeprefix(prefix)
        digits = "".join(takewhile(str.isdigit, tail))
        rest = tail[len(digits) :]
        key = (rest, row.was, row.now, row.kernel, row.reason)
        indices, same = merged.setdefault(key, ([], []))
        indices.append(int(digits))
        same.append(row)
    out = []
    for (rest, *_), (indices, same) in merged.items():
        run = indices == list(range(indices[0], indices[-1] + 1))
        many = f"{indices[0]}..{indices[-1]}" if run else ",".join(map(str, indices))
        one = str(indices[0]) if len(indices) == 1 else f"{{{many}}}"
        first = same[0]
        out.append(
            ReportRow(f"{prefix}{one}{rest}", first.was, first.now, first.kernel,
                      sum(row.bytes for row in same), first.reason)
        )  # fmt: skip
    return out
