"""A kernel over its workloads: what the cases of one operator do the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from . import peak, streams
from .peak import Work
from .results import Row
from .runner import (
    DTYPES,
    Options,
    ceilings_of,
    check_then_time,
    kernel_clock,
    matching,
    on_gpu,
    say,
)
from .timing import Contestant

Size = TypeVar("Size")


class Operands(Protocol):
    """One workload in one dtype, made ready."""

    def right_answer(self) -> Tensor:
        """What every contestant's result is compared with."""

    def contestants(self) -> Mapping[str, Callable[[], Contestant]]:
        """Who is raced, by name. A builder raises Unavailable where its contestant cannot run."""


def sweep(
    options: Options,
    workloads: Mapping[str, Size],
    make: Callable[[Size, torch.dtype, str], Operands],
    work: Callable[[Size, torch.dtype, str], Work],
    *,
    figure: str,
    reference: Callable[[Size], str],
    tolerance: Mapping[str, float],
    named: Callable[[str, Size], str] = lambda name, size: name,
    default: Sequence[str] = ("*",),
    budget_s: float = 3.0,
    copies: bool = False,
    finish: Callable[[list[Row], Size, str], None] | None = None,
) -> list[Row]:
    """Checks and times every workload and dtype asked for.

    Args:
        options: the command line.
        workloads: sizes by name.
        make: size, dtype and device to operands.
        work: size, dtype and contestant to what one run cannot do without; without a name, what
            the figure counts for everybody.
        figure: the name of what a row gets beside its times: operations, or with ``copies`` bytes,
            a second.
        reference: size to the contestant that ratios are formed against.
        tolerance: of the check, by dtype.
        named: the name that rows have, where it is not that of the workload.
        default: workloads where none were asked for.
        budget_s: seconds of samples for each workload and dtype.
        copies: race copies of as many bytes too, the yardstick of what is bound by memory.
        finish: adds the case's own figures to the rows of one workload and dtype.
    """
    rows: list[Row] = []
    for name in matching(list(workloads), options.workloads or default, "--workload"):
        size = workloads[name]
        for dtype in options.dtypes:
            least = work(size, DTYPES[dtype], "")
            say(f"{named(name, size)} {dtype}: {least}")
            operands = make(size, DTYPES[dtype], options.device)
            builders, exempt = dict(operands.contestants()), frozenset[str]()
            if copies:
                yardsticks = streams.Copies(least.moved, DTYPES[dtype], options.device)
                builders |= yardsticks.contestants()
                exempt = frozenset(streams.YARDSTICKS)
            works = {who: work(size, DTYPES[dtype], who) for who in builders}
            kinds = () if on_gpu(options.device) else peak.kinds_of(works.values())
            peaks = peak.yardsticks(kinds, options.threads)
            builders |= peak.contestants(peaks)
            found = check_then_time(
                builders,
                operands.right_answer(),
                workload=named(name, size),
                dtype=dtype,
                reference=reference(size),
                tolerance=tolerance[dtype],
                options=options,
                repeats=options.repeats or 25,
                budget_s=options.budget_s or budget_s,
                min_sample_s=0.0005 if on_gpu(options.device) else 0.004,
                pause_s=0.0,
                clock=kernel_clock(options),
                exempt=exempt | {one.name for one in peaks},
            )
            for row in found:
                own = row.figures.get("median_s")
                if own is not None:
                    row.figures[figure] = (least.moved if copies else least.counted) / own
            peak.add_figures(found, works, peaks, figure)
            if copies:
                streams.add_figures(found, least.moved, ceilings_of(options))
            if finish:
                finish(found, size, dtype)
            rows += found
    return rows
