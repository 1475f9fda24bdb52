"""Attention alone, over sequences of different lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import gpu_attention
from ..gpu import floor_s
from ..gpu_attention import VARLEN_ATTN, offsets
from ..ours import compiled_filbert
from ..peak import Work, kind_of
from ..results import Row
from ..runner import DTYPES, Options, ceilings_of, matching, on_gpu
from ..sweep import sweep
from ..timing import Contestant
from ..workloads import uniform_lengths

NAME = "attn_varlen"
ABOUT = "packed attention: SDPA on padded input, an SDPA call per sequence, filbert; on a GPU also "
ABOUT += "varlen_attn, flash-attn and FlexAttention"
REFERENCE = "SDPA, padded"
PER_SEQUENCE = "SDPA, call per sequence"
RATE = ("flop_per_s", "GFLOP/s", 1e-9)
RATE_ON_GPU = ("flop_per_s", "TFLOP/s", 1e-12)
HEADS, BATCH = 12, 16
#: sixteen sequences leave most of a GPU idle; there a batch has about this many tokens
GPU_TOKENS = 32 << 10
MAXIMA = (16, 32, 64, 128, 256, 512)
#: relative error of the worst (token, head) row against float64 on the same inputs; 16-bit results
#: are rounded, to 8 or 11 bits, and the probabilities may be too
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Mix:
    """Sequences of one kind: sixteen, or as many as hold about ``tokens`` tokens."""

    dim: int
    maximum: int
    mixed: bool
    tokens: int | None = None

    @property
    def name(self) -> str:
        size = "" if self.tokens is None else f"-{self.tokens >> 10}k"
        return f"d{self.dim}-{'max' if self.mixed else 'all'}{self.maximum}{size}"

    @property
    def batch(self) -> int:
        if self.tokens is None:
            return BATCH
        return round(self.tokens / (0.6 * self.maximum if self.mixed else self.maximum))

    @cached_property
    def lengths(self) -> list[int]:
        if not self.mixed:
            return [self.maximum] * self.batch
        return uniform_lengths(self.batch, self.maximum)

    @property
    def flop(self) -> float:
        """Multiplications and additions of both products on real tokens only."""
        return 4.0 * HEADS * self.dim * sum(length * length for length in self.lengths)

    def moved(self, dtype: torch.dtype) -> int:
        """Bytes that have to move: q, k and v in; out and a float32 lse for each row, out."""
        return sum(self.lengths) * HEADS * (4 * self.dim * dtype.itemsize + 4)

    def on(self, device: str) -> Mix:
        """The mix with a batch that fills the device; its name then ends in the tokens."""
        return replace(self, tokens=GPU_TOKENS) if on_gpu(device) else self


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
    lengths, size = mix.lengths, (mix.batch, mix.maximum, HEADS, mix.dim)
    real = torch.arange(mix.maximum) < torch.tensor(lengths)[:, None]  # [B, S]
    places = real.flatten().nonzero().squeeze(1).to(qkv.device)
    buffers = [qkv.new_zeros(size) for _ in range(3)]
    for buffer, part in zip(buffers, qkv.unbind(1), strict=True):
        buffer.flatten(0, 1)[places] = part
    q, k, v = (buffer.transpose(1, 2) for buffer in buffers)
    # Hugging Face drops a mask that hides nothing.
    mask = real[:, None, None].to(qkv.device) if mix.mixed else None

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    note = f"{mix.batch} sequences" if mix.tokens else ""
    return Contestant(REFERENCE, run, lambda value: value.flatten(0, 1)[places], note)


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
    """filbert on views of the one QKV buffer, nothing copied.

    On a GPU the list of tiles is made beforehand: one forward makes it once for all its layers.
    """
    filbert = compiled_filbert()
    op, ends = filbert.ops.attn_varlen, offsets(mix.lengths, qkv.device)
    q, k, v = qkv.unbind(1)
    longest, scale = mix.maximum, mix.dim**-0.5
    rows = qkv.shape[0]
    tiles = filbert.ops.attn_tiles(ends, ends, rows, rows) if qkv.is_cuda else None
    return Contestant(
        "filbert",
        lambda: op(q, k, v, ends, ends, longest, longest, scale, tiles=tiles)[0],
        lambda value: value,
        "" if tiles is None else "the list of tiles is not timed",
    )


def ours_alone(mix: Mix, qkv: Tensor) -> Contestant:
    """filbert called once: the list of tiles is made inside the call."""
    op, ends = compiled_filbert().ops.attn_varlen, offsets(mix.lengths, qkv.device)
    q, k, v = qkv.unbind(1)
    longest, scale = mix.maximum, mix.dim**-0.5
    return Contestant(
        "filbert, own tiles",
        lambda: op(q, k, v, ends, ends, longest, longest, scale)[0],
        lambda value: value,
    )


Builder = Callable[[Mix, Tensor], Contestant]
BUILDERS: dict[str, Builder] = {REFERENCE: padded, PER_SEQUENCE: per_sequence, "filbert": ours}
GPU_BUILDERS: dict[str, Builder] = {
    REFERENCE: padded,
    PER_SEQUENCE: per_sequence,
    VARLEN_ATTN: gpu_attention.varlen_attn,
    gpu_attention.FLASH_ATTN: gpu_attention.flash_attn,
    gpu_attention.FLEX_ATTENTION: gpu_attention.flex_attention,
    "filbert": ours,
    "filbert, own tiles": ours_alone,
}


@dataclass(frozen=True)
class _Given:
    """One mix of lengths and its rows."""

    mix: Mix
    qkv: Tensor
    builders: dict[str, Builder]

    def right_answer(self) -> Tensor:
        return right_answer(self.mix, self.qkv)

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        return {n: partial(build, self.mix, self.qkv) for n, build in self.builders.items()}


def work(mix: Mix, dtype: torch.dtype, who: str) -> Work:
    """Both products on real tokens; q, k and v read and the result written once."""
    del who
    return Work({kind_of(dtype): mix.flop}, mix.moved(dtype))


def run(options: Options) -> list[Row]:
    """Checks and times every way there is on this device, on every mix of lengths asked for."""
    known = GPU_BUILDERS if on_gpu(options.device) else BUILDERS
    wanted = matching(list(known), options.baselines or ("*",), "--baseline")
    chosen = {
        n: b for n, b in known.items() if n in wanted or n == REFERENCE or n.startswith("filbert")
    }

    def finish(rows: list[Row], mix: Mix, dtype: str) -> None:
        del dtype
        for row in (row for row in rows if row.contestant in chosen):
            row.axis = {
                "panel": f"D={mix.dim}, {'mixed' if mix.mixed else 'equal'} lengths",
                "x": mix.maximum,
                "x_label": "longest sequence (tokens)",
            }
        add_figures(rows, mix, ceilings_of(options))

    return sweep(
        options, {n: mix.on(options.device) for n, mix in WORKLOADS.items()},
        lambda mix, dtype, device: _Given(mix, inputs(mix, dtype, device), chosen), work,
        figure=RATE[0], reference=lambda _: REFERENCE, tolerance=TOLERANCE,
        named=lambda name, mix: mix.name, budget_s=2.0, finish=finish,
    )  # fmt: skip


def add_figures(rows: list[Row], mix: Mix, ceiling: dict[str, float] | None) -> None:
    """Ratios to other baselines than the reference and, on a GPU, the share of the floor."""
    by_name = {row.contestant: row for row in rows}
    for row in rows:
        own = row.figures.get("median_s")
        if own is None:
            continue
        for name, figure in (
            (PER_SEQUENCE, "ratio_to_per_sequence"),
            (VARLEN_ATTN, "ratio_to_varlen_attn"),
        ):
            other = by_name.get(name)
            if other is not None and other is not row and (seen := other.ratios_of(row)):
                row.figures[figure] = statistics.median(seen)
        if ceiling is not None:
            moved = mix.moved(DTYPES[row.dtype])
            row.figures["bytes_per_s"] = moved / own
            row.figures["share_of_floor"] = floor_s(mix.flop, moved, ceiling) / own
