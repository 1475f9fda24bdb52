"""What the processor can do at most, measured beside what is compared with it.

A share of the peak carries over from one machine to the next, milliseconds do not. Loops of one
instruction on registers say how many operations a second there are (``bench/native/peak.cpp``), a
copy of memory says how many bytes. The loops take their turns in a race as contestants do, so a
processor that runs at half its speed for a while does so for both sides of a share. A GPU's
ceilings are in :mod:`bench.gpu`.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from .results import Row
from .timing import Contestant, Unavailable

#: kinds of operation -> (the number of its loop, what is counted)
LOOPS = {
    "fma": (0, "float32 additions and multiplications"),
    "bf16": (1, "the same of bfloat16 pairs, summed in float32"),
    "int8": (2, "additions and multiplications of int8, summed in int32"),
    "bits": (3, "bits that are ANDed, counted and summed"),
}
#: beside operations: bytes read and bytes written by a copy that leaves the caches
COPY = "copy"
KINDS = (*LOOPS, COPY)
COPY_BYTES = 64 << 20
#: what the names of yardsticks begin with in a race
PREFIX = "peak: "
#: what one run takes, at least
RUN_S = 0.005


@dataclass(frozen=True)
class Work:
    """What one run of a contestant cannot do without.

    Attributes:
        operations: of each kind, as :data:`LOOPS` counts them.
        moved: bytes, each operand read once and each result written once.
    """

    operations: Mapping[str, float] = field(default_factory=dict)
    moved: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The peaks that bound it."""
        return (*self.operations, COPY) if self.moved else tuple(self.operations)

    @property
    def counted(self) -> float:
        """Operations of all kinds."""
        return sum(self.operations.values())

    def needs(self, kind: str) -> float:
        """Operations of a kind, or bytes."""
        return float(self.moved) if kind == COPY else self.operations[kind]

    def __str__(self) -> str:
        parts = [f"{count:.2g} {kind} operations" for kind, count in self.operations.items()]
        return ", ".join([*parts, f"{self.moved / 2**20:.1f} MiB moved"])


def kinds_of(works: Iterable[Work]) -> tuple[str, ...]:
    """The peaks that bound any of them."""
    found = {kind for work in works for kind in work.kinds}
    return tuple(kind for kind in KINDS if kind in found)


def kind_of(dtype: torch.dtype) -> str:
    """The kind of operation that a float product of that dtype is made of on this processor."""
    from filbert import _load

    pairs = _load.C is not None and _load.C.isa_details()["bf16_pairs"]
    return "bf16" if dtype == torch.bfloat16 and pairs else "fma"


@lru_cache(maxsize=1)
def _loop() -> Callable[[int, int, int, int], int]:
    from filbert import _load

    path = _load.folder / "libfilbert_peak.so" if _load.folder else None
    if path is None or not path.exists():
        raise Unavailable("built without FILBERT_BENCH; make build builds with it")
    function = ctypes.CDLL(str(path)).filbert_peak
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    function.restype = ctypes.c_int64
    return function


def _width() -> int:
    """How wide the loops may be: as the instruction set that filbert uses."""
    from filbert import _load

    isa = _load.isa()
    return 2 if isa.startswith("avx512") else 1 if isa.startswith("avx2") else 0


@dataclass(frozen=True)
class Yardstick:
    """Something that runs at the peak of its kind: how much of it one run does."""

    kind: str
    amount: float
    run: Callable[[], object]

    @property
    def name(self) -> str:
        return PREFIX + self.kind


def _loops(kind: str, threads: int) -> Yardstick:
    """``threads`` loops side by side."""
    loop, number, width = _loop(), LOOPS[kind][0], _width()
    rounds = 1 << 14
    if loop(number, width, rounds, threads) == 0:
        raise Unavailable(f"this processor has no instruction for {kind}")
    while True:  # as many rounds as fill a run
        start = time.perf_counter()
        done = loop(number, width, rounds, threads)
        if (took := time.perf_counter() - start) >= RUN_S:
            break
        rounds *= 2 if took < RUN_S / 4 else 1 + int(RUN_S / took)
    return Yardstick(kind, done, lambda: loop(number, width, rounds, threads))


def _copies() -> Yardstick:
    """A copy by as many threads as torch uses."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    return Yardstick(COPY, 2.0 * COPY_BYTES, lambda: target.copy_(source))


def yardsticks(kinds: Iterable[str], threads: int) -> list[Yardstick]:
    """What runs at the peaks of those ``kinds`` with so many threads.

    What this processor has no instruction for is left out, and so is every kind of operation where
    the library of loops was not built.
    """
    found = []
    for kind in kinds:
        with suppress(Unavailable):
            found.append(_copies() if kind == COPY else _loops(kind, threads))
    return found


def contestants(yardsticks: Iterable[Yardstick]) -> dict[str, Callable[[], Contestant]]:
    """The yardsticks as they take part in a race; there is nothing to check about them."""
    nothing = torch.zeros(1)
    return {
        own.name: lambda own=own: Contestant(own.name, own.run, lambda _: nothing)  # type: ignore[misc]
        for own in yardsticks
    }


def add_figures(
    rows: Sequence[Row], works: Mapping[str, Work], yardsticks: Sequence[Yardstick], figure: str
) -> None:
    """Gives every timed row of a race its share of the peak, and the yardsticks their rates.

    The share is the time of whatever bounds the work longest at its peak, by the time that was
    taken: the median over the rounds that both ran in.

    Args:
        rows: of one race.
        works: what a run cannot do without, by contestant; others have no share.
        yardsticks: those that took part.
        figure: the name of a row's rate.
    """
    by_name = {row.contestant: row for row in rows}
    timed = [one for one in yardsticks if by_name.get(one.name) and by_name[one.name].samples_s]
    for one in timed:
        own = by_name[one.name]
        own.figures[figure] = one.amount / own.figures["median_s"]
    for row in rows:
        work = works.get(row.contestant)
        if work is None or not row.samples_s:
            continue
        shares = []
        for one in timed:
            if one.kind in work.kinds and (seen := by_name[one.name].ratios_of(row)):
                shares.append(statistics.median(seen) * work.needs(one.kind) / one.amount)
        if len(shares) == len(work.kinds):  # else what bounds it may be what was not measured
            row.figures["share_of_peak"] = max(shares)


def measure(kind: str, threads: int) -> float:
    """The peak of one kind with so many threads, a second: the best of a few runs.

    Raises:
        Unavailable: there is no such instruction, or no library of loops.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one = _copies() if kind == COPY else _loops(kind, threads)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            one.run()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return one.amount / min(times)
