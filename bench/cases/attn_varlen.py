"""Attention alone, over sequences of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ours import compiled_filbert
from ..results import Row
from ..runner import DTYPES, Options, check_then_time, matching, say
from ..timing import Contestant
from ..workloads import uniform_lengths

NAME = "attn_varlen"
ABOUT = "packed attention: SDPA on padded input, an SDPA call per sequence, filbert"
REFERENCE = "SDPA, padded"
PER_SEQUENCE = "SDPA, call per sequence"
RATE = ("flop_per_s", "GFLOP/s", 1e-9)
HEADS, BATCH = 12, 16
MAXIMA = (16, 32, 64, 128, 256, 512)
#: relative error of the worst (token, head) row against float64 on the same inputs; bfloat16
#: results are rounded to 8 bits, and the probabilities may be too
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Mix:
    """Sixteen sequences of one kind."""

    dim: int
    maximum: int
    mixed: bool

    @property
    def name(self) -> str:
        return f"d{self.dim}-{'max' if self.mixed else 'all'}{self.maximum}"

    @property
    def lengths(self) -> list[int]:
        return uniform_lengths(BATCH, self.maximum) if self.mixed else [self.maximum] * BATCH

    @property
    def flop(self) -> float:
        """Multiplications and additions of both products on real tokens only."""
        return 4.0 * HEADS * self.dim * sum(length * length for length in self.lengths)


WORKLOADS = {
    mix.name: mix
    for mix in (Mix(d, m, mixed) for d in (64, 32) for mixed in (True, False) for m in MAXIMA)
}


def inputs(mix: Mix, dtype: torch.dtype, device: str) -> Tensor:
    """One QKV buffer ``[T, 3, H, D]``; scores have a standard deviation near 2, as trained ones."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(mix.lengths), 3, HEADS, mix.dim, generator=generator)
    qkv[:, :2] *= 1.4
    return qkv.to(dtype).to(device)


def right_answer(mix: Mix, qkv: Tensor) -> Tensor:
    """Softmax attention written out in float64, one sequence at a time: ``[T, H, D]``."""
    out = []
    for rows in qkv.double().split(mix.lengths):
        q, k, v = rows.permute(1, 2, 0, 3)
        out.append((q @ k.mT * mix.dim**-0.5).softmax(-1) @ v)
    return torch.cat(out, 1).transpose(0, 1)


def padded(mix: Mix, qkv: Tensor) -> Contestant:
    """As Hugging Face calls it: [B, H, S, D] views of padded rows and a boolean mask.

    Padding and unpadding happen once per model there, so they are not timed here.
    """
    lengths, size = mix.lengths, (BATCH, mix.maximum, HEADS, mix.dim)
    buffers = [qkv.new_zeros(size) for _ in range(3)]
    mask = torch.zeros(BATCH, 1, 1, mix.maximum, dtype=torch.bool, device=qkv.device)
    for s, rows in enumerate(qkv.split(lengths)):
        mask[s, ..., : lengths[s]] = True
        for buffer, part in zip(buffers, rows.unbind(1), strict=True):
            buffer[s, : lengths[s]] = part
    q, k, v = (buffer.transpose(1, 2) for buffer in buffers)
    needed = mask if mix.mixed else None  # Hugging Face drops a mask that hides nothing

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=needed).transpose(1, 2)

    def result(value: Tensor) -> Tensor:
        return torch.cat([value[s, :length] for s, length in enumerate(lengths)])

    return Contestant(REFERENCE, run, result)


def per_sequence(mix: Mix, qkv: Tensor) -> Contestant:
    """An SDPA call on the views of each sequence, results gathered into packed rows."""
    lengths = mix.lengths
    rows = qkv.unsqueeze(0).transpose(1, 3)  # [1, H, 3, T, D]

    def run() -> Tensor:
        parts = [
            F.scaled_dot_product_attention(*part.unbind(2)).transpose(1, 2)
            for part in rows.split(lengths, dim=3)
        ]
        return torch.cat(parts, 1)

    return Contestant(PER_SEQUENCE, run, lambda value: value[0])


def ours(mix: Mix, qkv: Tensor) -> Contestant:
    """filbert on views of the one QKV buffer, nothing copied."""
    op = compiled_filbert().ops.attn_varlen
    ends = torch.tensor([0, *mix.lengths]).cumsum(0).to(torch.int32).to(qkv.device)
    q, k, v = qkv.unbind(1)
    longest, scale = mix.maximum, mix.dim**-0.5
    return Contestant(
        "filbert",
        lambda: op(q, k, v, ends, ends, longest, longest, scale)[0],
        lambda value: value,
    )


BUILDERS: dict[str, Callable[[Mix, Tensor], Contestant]] = {
    REFERENCE: padded,
    PER_SEQUENCE: per_sequence,
    "filbert": ours,
}


def run(options: Options) -> list[Row]:
    """Checks and times the three ways on every mix of lengths asked for."""
    rows: list[Row] = []
    chosen = matching(list(BUILDERS), options.baselines or ("*",), "--baseline")
    for name in matching(list(WORKLOADS), options.workloads or ("*",), "--workload"):
        mix = WORKLOADS[name]
        say(f"{name}: {sum(mix.lengths)} tokens, {mix.flop / 1e9:.2f} GFLOP")
        for dtype in options.dtypes:
            qkv = inputs(mix, DTYPES[dtype], options.device)
            found = check_then_time(
                {
                    n: lambda build=build, qkv=qkv, mix=mix: build(mix, qkv)  # type: ignore[misc]
                    for n, build in BUILDERS.items()
                    if n in chosen or n in (REFERENCE, "filbert")
                },
                right_answer(mix, qkv),
                workload=name,
                dtype=dtype,
                reference=REFERENCE,
                tolerance=TOLERANCE[dtype],
                options=options,
                repeats=options.repeats or 25,
                budget_s=options.budget_s or 2.0,
                min_sample_s=0.004,
                pause_s=0.0,
            )
            for row in found:
                row.axis = {
                    "panel": f"D={mix.dim}, {'mixed' if mix.mixed else 'equal'} lengths",
                    "x": mix.maximum,
                    "x_label": "longest sequence (tokens)",
                }
            _add_figures(found, mix)
            rows += found
    return rows


def _add_figures(rows: list[Row], mix: Mix) -> None:
    by_name = {row.contestant: row for row in rows}
    other = by_name.get(PER_SEQUENCE)
    for row in rows:
        if "median_s" not in row.figures:
            continue
        row.figures["flop_per_s"] = mix.flop / row.figures["median_s"]
        if other is not None and "median_s" in other.figures and row is not other:
            row.figures["ratio_to_per_sequence"] = (
                other.figures["median_s"] / row.figures["median_s"]
            )
