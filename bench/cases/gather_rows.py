"""Packing and unpacking rows, measured against the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import streams
from ..ours import compiled_filbert
from ..peak import Work
from ..results import Row
from ..runner import DTYPES, Options
from ..sweep import sweep
from ..timing import Contestant
from ..workloads import uniform_lengths

NAME = "gather_rows"
ABOUT = "packing and unpacking hidden states: index_select, index_copy_, filbert, copies"
RATE = streams.RATE


@dataclass(frozen=True)
class Batch:
    """``batch`` sequences of up to ``maximum`` tokens, 0.6 of it on average, ``width`` wide."""

    unpacks: bool
    batch: int
    maximum: int
    width: int

    @property
    def name(self) -> str:
        kind = "unpack" if self.unpacks else "pack"
        return f"{kind}-{self.batch}x{self.maximum}x{self.width}"

    @property
    def reference(self) -> str:
        return "zeros, index_copy_" if self.unpacks else "index_select"

    @property
    def lengths(self) -> list[int]:
        return uniform_lengths(self.batch, self.maximum)

    def moved(self, dtype: torch.dtype) -> int:
        """Bytes that have to move: kept rows in; out go those, or every row of the padded batch.

        Each row that is written has an index of eight bytes that is read.
        """
        kept = sum(self.lengths)
        written = self.batch * self.maximum if self.unpacks else kept
        return (kept + written) * self.width * dtype.itemsize + 8 * written


WORKLOADS = {
    batch.name: batch
    for batch in (Batch(unpacks, b, 256, 768) for b in (16, 128) for unpacks in (False, True))
}


class _Inputs:
    def __init__(self, size: Batch, dtype: torch.dtype, device: str) -> None:
        lengths = torch.tensor(size.lengths)
        mask = torch.arange(size.maximum) < lengths[:, None]
        kept = mask.flatten()
        rows = len(kept) if not size.unpacks else int(kept.sum())
        generator = torch.Generator().manual_seed(0)
        self.size, self.rows = size, len(kept)
        self.x = torch.randn(rows, size.width, generator=generator).to(dtype).to(device)
        #: where each packed row comes from, ``[T]``
        self.places = kept.nonzero().squeeze(1).to(device)
        #: which packed row goes where, -1 where padding was, ``[B * S]``
        self.back = torch.where(kept, kept.cumsum(0) - 1, -1).to(device)

    def right_answer(self) -> Tensor:
        if not self.size.unpacks:
            return self.x[self.places]
        padded = self.x.new_zeros(self.rows, self.x.shape[1])
        padded[self.places] = self.x
        return padded

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        return {self.size.reference: partial(eager, self), "filbert": partial(ours, self)}


def eager(given: _Inputs) -> Contestant:
    def pack() -> Tensor:
        return given.x.index_select(0, given.places)

    def unpack() -> Tensor:
        padded = given.x.new_zeros(given.rows, given.x.shape[1])
        return padded.index_copy_(0, given.places, given.x)

    run = unpack if given.size.unpacks else pack
    return Contestant(given.size.reference, run, lambda value: value)


def ours(given: _Inputs) -> Contestant:
    op = compiled_filbert().ops.gather_rows
    index = given.back if given.size.unpacks else given.places
    return Contestant("filbert", lambda: op(given.x, index), lambda value: value)


def work(size: Batch, dtype: torch.dtype, who: str) -> Work:
    del who
    return Work(moved=size.moved(dtype))


def run(options: Options) -> list[Row]:
    """Checks and times every batch asked for; the result has to be exact."""
    return sweep(
        options, WORKLOADS, _Inputs, work,
        figure=RATE[0], reference=lambda batch: batch.reference,
        tolerance=dict.fromkeys(DTYPES, 0.0), copies=True,
    )  # fmt: skip
