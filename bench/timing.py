"""Times several contestants side by side on a machine that is not quiet.

On a shared machine the speed of the processor drifts by tens of per cent within a minute, so a
contestant timed alone is compared with the weather. Here all contestants live in one process and
take turns: a *round* runs each of them once, the order rotates from round to round, and ratios are
formed inside a round, where both sides had the same weather.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

#: rounds that are run even over the budget, unless they would take three times as long
LEAST_ROUNDS = 3


class Unavailable(Exception):
    """A contestant cannot run here; the message is the reason that the table shows."""


@dataclass
class Contestant:
    """One way to do the work."""

    name: str
    #: the timed part
    run: Callable[[], Any]
    #: the untimed part: from what ``run`` returned to the tensor that the check compares
    result: Callable[[Any], Tensor]
    #: said in the table, such as a precision that the runtime chose by itself
    note: str = ""
    #: untimed, before every run: restores what a run in place wrote over
    before: Callable[[], Any] | None = None
    #: seconds of the last run that was not measured; fills in as the contestant is checked
    estimate_s: float = 0.0


@dataclass(frozen=True)
class Timing:
    """All samples of one contestant, in seconds per run."""

    samples_s: tuple[float, ...]
    #: the round that each sample was taken in
    rounds: tuple[int, ...]
    #: runs averaged into one sample
    inner: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        return quartiles(self.samples_s)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """First and third quartile; of a single sample, itself twice."""
    if len(samples) == 1:
        return samples[0], samples[0]
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, third


def ratios(reference: Timing, own: Timing) -> list[float]:
    """How many times faster ``own`` is than ``reference``, for every round that both ran in."""
    theirs = dict(zip(reference.rounds, reference.samples_s, strict=True))
    pairs = zip(own.rounds, own.samples_s, strict=True)
    return [theirs[r] / sample for r, sample in pairs if r in theirs]


def periods(costs: Sequence[float], budget_s: float, repeats: int) -> list[int]:
    """How rarely each contestant takes its turn, so that all together keep to a budget.

    The budget is divided evenly; what a cheap contestant does not need goes to the dearer ones. One
    that cannot afford all rounds takes part in every second, fourth, eighth, ... Powers of two
    nest: two slow contestants still meet in the same rounds and keep a ratio.

    Args:
        costs: seconds that one sample of each contestant takes.
        budget_s: seconds for all samples of all rounds.
        repeats: rounds there can be at most.
    """
    found = [1] * len(costs)
    left = budget_s
    for place, i in enumerate(sorted(range(len(costs)), key=lambda i: costs[i])):
        share = left / (len(costs) - place)
        affordable = min(repeats, max(1.0, share / max(costs[i], 1e-9)))
        found[i] = 1 << int(math.log2(repeats / affordable))
        left = max(0.0, left - affordable * costs[i])
    return found


class Clock(Protocol):
    """How one run is timed: the seam between a race and the device that runs."""

    def prepare(self) -> None:
        """Called once before a race."""

    def time(
        self, run: Callable[[], Any], repeats: int = 1, before: Callable[[], Any] | None = None
    ) -> tuple[Any, float]:
        """The value of the last of ``repeats`` runs, and the mean seconds of one.

        ``before`` is called before every run and is not timed.
        """


class WallClock:
    """What a caller waits.

    Args:
        synchronize: waits for the device; None on the CPU. It is called after every run, not after
            a sample: runs that queue up behind each other hide what launching them costs.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize

    def prepare(self) -> None:
        """Nothing: the race's own warm-up is enough."""

    def time(
        self, run: Callable[[], Any], repeats: int = 1, before: Callable[[], Any] | None = None
    ) -> tuple[Any, float]:
        wait = self._synchronize
        if wait is None and before is None:  # the loop costs what a run of microseconds feels
            start = time.perf_counter()
            for _ in range(repeats - 1):
                run()
            value = run()
            return value, (time.perf_counter() - start) / repeats
        total, value = 0.0, None
        for _ in range(repeats):
            value = None  # its memory is the next run's, as in a loop that keeps nothing
            if before:
                before()
            if wait:
                wait()
            start = time.perf_counter()
            value = run()
            if wait:
                wait()
            total += time.perf_counter() - start
        return value, total / repeats


def race(
    contestants: Sequence[Contestant],
    *,
    repeats: int,
    budget_s: float,
    min_sample_s: float = 0.0,
    pause_s: float = 0.0,
    clock: Clock | None = None,
    settle: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times all contestants in rounds.

    Args:
        contestants: each already run once, with ``estimate_s`` filled in.
        repeats: rounds at most.
        budget_s: seconds that all samples together should take.
        min_sample_s: runs shorter than this are repeated inside one sample.
        pause_s: rest before every sample, so that the worker threads of the runtime that ran
            before stop spinning and leave the cores to the next one.
        clock: times the runs; the wall clock of the CPU if not given.
        settle: called before the first round and then about once a second between rounds; what it
            takes counts for no contestant and not for the budget.

    Returns:
        The timing of every contestant, by name.
    """
    clock = clock or WallClock()
    clock.prepare()
    if settle:
        settle()
    inner: dict[str, int] = {}
    for c in contestants:
        # A warm second look: the first run paid for caches, page faults and lazy initialisation.
        if c.estimate_s < budget_s / 20:
            c.estimate_s = min(c.estimate_s, clock.time(c.run, 1, c.before)[1])
        inner[c.name] = max(1, round(min_sample_s / max(c.estimate_s, 1e-7)))
    samples: dict[str, list[float]] = {c.name: [] for c in contestants}
    rounds: dict[str, list[int]] = {c.name: [] for c in contestants}
    # What a sample takes of the budget: a clock may do more around a run than it times.
    taken: dict[str, list[float]] = {c.name: [] for c in contestants}

    def cost(c: Contestant) -> float:
        """Seconds that one sample takes, from the best knowledge there is so far."""
        if taken[c.name]:
            return statistics.median(taken[c.name])
        return c.estimate_s * inner[c.name] + pause_s

    def sample(c: Contestant) -> float:
        begun = time.perf_counter()
        if pause_s:
            time.sleep(pause_s)
        seconds = clock.time(c.run, inner[c.name], c.before)[1]
        taken[c.name].append(time.perf_counter() - begun)
        return seconds

    for c in contestants:
        if cost(c) < budget_s / 20:
            sample(c)  # the warm-up round
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is alive now outlives the race: collecting between rounds need not walk it
    gc.disable()
    start = settled = time.perf_counter()
    try:
        for r in range(repeats):
            if settle and time.perf_counter() - settled > 1.0:
                waiting = time.perf_counter()
                settle()
                settled = time.perf_counter()
                start += settled - waiting
            costs = [cost(c) for c in contestants]
            every = periods(costs, budget_s, repeats)
            turn = [i for i in range(len(contestants)) if r % every[i] == 0]
            spent = time.perf_counter() - start
            # A spread needs a few rounds; but a machine that turned slow does not get hours.
            limit = budget_s if r >= LEAST_ROUNDS else 3 * budget_s
            if r and spent + sum(costs[i] for i in turn) > limit:
                break
            for step in range(len(turn)):
                c = contestants[turn[(step + r) % len(turn)]]
                samples[c.name].append(sample(c))
                rounds[c.name].append(r)
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return {
        c.name: Timing(tuple(samples[c.name]), tuple(rounds[c.name]), inner[c.name])
        for c in contestants
    }
