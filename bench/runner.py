"""Check, then time, in one place: the only road from a contestant to a number."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .baselines import first_line
from .check import check
from .environment import wait_for_quiet
from .results import Row, checked, unavailable
from .timing import Clock, Contestant, Unavailable, WallClock, race

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def dtypes_on(device: str) -> list[str]:
    """The dtypes that can be asked for there; filbert's CPU kernels have no float16."""
    return [name for name in DTYPES if on_gpu(device) or name != "float16"]


def default_dtypes(device: str) -> tuple[str, ...]:
    return ("float16", "bfloat16") if on_gpu(device) else ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """The command line, as every case reads it. None means: the case's own default."""

    workloads: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    only: str = "*"
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    repeats: int | None = None
    budget_s: float | None = None
    device: str = "cpu"
    threads: int = 1
    compile_limit_s: float = 240.0
    #: seconds to wait, again and again, for other processes to leave the cores alone; 0 = never
    wait_quiet_s: float = 0.0

    def wants(self, key: str) -> bool:
        """Is ``workload/dtype/contestant`` inside ``--only``?"""
        return any(fnmatchcase(key, pattern) for pattern in (self.only, f"*{self.only}*"))


def say(text: str) -> None:
    """Progress goes to stderr; stdout holds the table and nothing else."""
    print(text, file=sys.stderr, flush=True)


def matching(names: Sequence[str], patterns: Sequence[str], kind: str) -> list[str]:
    """The names that match any pattern, in the order of ``names``.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    lower = [pattern.lower() for pattern in patterns]
    for pattern in lower:
        if not any(fnmatchcase(name.lower(), pattern) for name in names):
            raise ValueError(f"{kind}: got {pattern!r}, need one of {', '.join(names)}; try a glob")
    return [name for name in names if any(fnmatchcase(name.lower(), p) for p in lower)]


def kernel_clock(options: Options) -> Clock:
    """For single operators: on a GPU the device's own time, and a cold cache before every run."""
    if not on_gpu(options.device):
        return WallClock()
    from .gpu_timing import EventClock

    return EventClock.of(options.device)


def caller_clock(options: Options) -> Clock:
    """For whole models: what the caller waits for, launches included."""
    return WallClock(torch.cuda.synchronize if on_gpu(options.device) else None)


def ceilings_of(options: Options) -> dict[str, float] | None:
    """What was measured of the GPU, see :func:`bench.gpu.ceilings`; None on the CPU."""
    if not on_gpu(options.device):
        return None
    from .gpu import ceilings

    return ceilings(options.device)


def check_then_time(
    builders: Mapping[str, Callable[[], Contestant]],
    right_answer: Tensor,
    *,
    workload: str,
    dtype: str,
    reference: str,
    tolerance: float,
    options: Options,
    repeats: int,
    budget_s: float,
    min_sample_s: float,
    pause_s: float,
    clock: Clock,
    exempt: frozenset[str] = frozenset(),
) -> list[Row]:
    """Builds every contestant, checks its answer, and races those whose answer is right.

    Args:
        builders: by contestant's name; a builder raises Unavailable with a reason.
        right_answer: what ``Contestant.result`` has to give, within ``tolerance``.
        reference: the contestant that ratios are formed against.
        exempt: contestants that compute something else on purpose, such as the copy that bandwidth
            is compared with; they are checked against their own input by their builder.
        clock: times the runs, the first one that is checked too.

    Returns:
        One row per contestant; only rows with status ``ok`` have times.
    """
    rows: dict[str, Row] = {}
    fit: list[Contestant] = []
    for name, build in builders.items():
        if not options.wants(f"{workload}/{dtype}/{name}") and name != reference:
            continue
        say(f"  {workload} {dtype}: checking {name}")
        try:
            contestant = build()
            value, seconds = clock.time(contestant.run, 1, contestant.before)
            got = contestant.result(value)
        except Unavailable as error:
            rows[name] = unavailable(workload, dtype, name, reference, str(error))
            continue
        except Exception as error:  # one broken contestant must not end the race of the others
            reason = f"{type(error).__name__}: {first_line(error)}"
            rows[name] = unavailable(workload, dtype, name, reference, reason)
            continue
        wanted = got if name in exempt else right_answer
        outcome = check(got, wanted, tolerance)
        del value, got
        rows[name] = checked(workload, dtype, name, reference, contestant.note, outcome)
        if outcome.passed:
            contestant.estimate_s = seconds
            fit.append(contestant)
        else:
            say(f"    {outcome.reason}: not timed")
    say(f"  {workload} {dtype}: timing {', '.join(c.name for c in fit) or 'nobody'}")
    timings = race(
        fit, repeats=repeats, budget_s=budget_s, min_sample_s=min_sample_s, pause_s=pause_s,
        clock=clock,
        settle=(lambda: wait_for_quiet(options.wait_quiet_s)) if options.wait_quiet_s else None,
    )  # fmt: skip
    for c in fit:
        rows[c.name].add_timing(timings[c.name], timings.get(reference))
    return list(rows.values())
