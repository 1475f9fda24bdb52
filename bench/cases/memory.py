"""Peak memory of one forward pass over what weights and libraries hold anyway.

Each contestant runs in a process of its own: allocators keep what earlier ones gave back. Beside
the rise of resident memory stands the peak of what PyTorch's allocator had given out, which leaves
out what kernels and libraries take by themselves, and pages that are kept.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..baselines import first_line
from ..check import check
from ..engines import Setup, contestant, reference_answer
from ..environment import ROOT
from ..models import Builder
from ..results import Row, checked, unavailable
from ..runner import DTYPES, Options, matching, say
from ..timing import Unavailable
from ..workloads import WORKLOADS, model
from . import e2e, e2e_lowrank

NAME = "memory"
ABOUT = "peak resident memory of one forward pass over the loaded model, each in a fresh process"
REFERENCE = e2e.REFERENCE
RATE = ("peak_over_bytes", "MiB over the model", 2.0**-20)
DEFAULT = ("bert-base-256", "minilm-topics")
#: torch.compile is left out: what its compiler leaves behind would be counted as the model's
LEFT_OUT = ("torch.compile",)
STATUS = Path("/proc/self/status")
#: case -> dtype and workload to its contestants
SETS: dict[str, Callable[[str, bool], Mapping[str, Builder]]] = {
    e2e.NAME: lambda dtype, pooled: e2e.builders(Options(), dtype, pooled),
    e2e_lowrank.NAME: lambda dtype, pooled: e2e_lowrank.MEMORY,
}


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Unavailable(f"the kernel does not report {field}")


def _give_back() -> None:
    """Returns freed heap to the system, so that it does not hide what the next run allocates."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return


def peak_over(run: Callable[[], Any]) -> tuple[Any, int, str]:
    """Runs ``run`` and measures how far resident memory rose above where it stood.

    Returns:
        the value of ``run()``, the rise in bytes, and how it was seen: the kernel's own high-water
        mark where that can be reset, else samples every millisecond.
    """
    if not STATUS.exists():
        raise Unavailable("resident memory is read from /proc, which this system does not have")
    _give_back()
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _sampled(run, before)
    # Where the write is accepted and ignored, the mark still stands at some earlier peak.
    if _status("VmHWM") > before + (4 << 20):
        return _sampled(run, before)
    value = run()
    return value, max(0, _status("VmHWM") - before), "high-water mark"


def _sampled(run: Callable[[], Any], before: int) -> tuple[Any, int, str]:
    top, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            top[0] = max(top[0], _status("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        value = run()
    finally:
        done.set()
        watcher.join()
    return value, max(top[0], _status("VmRSS")) - before, "samples every millisecond"


def allocated_over(run: Callable[[], Any]) -> int:
    """Runs ``run``, and gives the most bytes that PyTorch had given out for it at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = top = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top


def measure(case: str, workload_name: str, dtype: str, name: str, threads: int) -> Row:
    """Measures one contestant of a case in this process, which should be fresh."""
    torch.set_num_threads(threads)
    builders = SETS[case](dtype, True)
    try:
        workload = WORKLOADS[workload_name]()
        setup = Setup(model(workload.model), workload, DTYPES[dtype], "cpu", threads)
        engine = builders[name](setup)
        # Lazy initialisation happens on a few tokens, where it allocates nothing large.
        small = replace(workload, sequences=(workload.sequences[0][:64],), seq_len=None)
        contestant(name, engine, replace(setup, workload=small)).run()
        racer = contestant(name, engine, setup)
        value, rise, how = peak_over(racer.run)
        got = racer.result(value)
        wanted = got if name in e2e_lowrank.EXEMPT else reference_answer(setup)
        outcome = check(got, wanted, e2e.TOLERANCE[dtype])
        del value
        allocated = allocated_over(racer.run)
    except Unavailable as error:
        return unavailable(workload_name, dtype, name, REFERENCE, str(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return unavailable(workload_name, dtype, name, REFERENCE, reason)
    notes = "; ".join(part for part in (racer.note, how) if part)
    row = checked(workload_name, dtype, name, REFERENCE, notes, outcome)
    if outcome.passed:
        row.figures |= {"peak_over_bytes": float(rise), "allocated_bytes": float(allocated)}
    return row


def _in_a_fresh_process(case: str, workload: str, dtype: str, name: str, threads: int) -> Row:
    command = [sys.executable, "-W", "ignore", "-m", "bench.cases.memory"]
    command += [case, workload, dtype, name, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return unavailable(workload, dtype, name, REFERENCE, "took longer than 600 s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        reason = f"its process ended with status {done.returncode}: {tail[:200]}"
        return unavailable(workload, dtype, name, REFERENCE, reason)
    return Row(**json.loads(lines[-1]))


def run(options: Options) -> list[Row]:
    """Measures every contestant asked for, one process each."""
    return race(e2e.NAME, options, DEFAULT)


def race(case: str, options: Options, default: Sequence[str]) -> list[Row]:
    """The same for the contestants of a case of :data:`SETS`."""
    if options.device != "cpu":
        raise ValueError(f"--device: got {options.device!r}, need 'cpu' for the memory case")
    rows: list[Row] = []
    for name in matching(list(WORKLOADS), options.workloads or default, "--workload"):
        pooled = name in ("minilm-topics", "query-minilm")
        for dtype in options.dtypes:
            found = []
            names = list(SETS[case](dtype, pooled))
            chosen = matching(names, options.baselines or ("*",), "--baseline")
            for who in names:
                if who not in chosen and not who.startswith("filbert") and who != REFERENCE:
                    continue
                wanted = options.wants(f"{name}/{dtype}/{who}") or who == REFERENCE
                if who in LEFT_OUT or not wanted:
                    continue
                say(f"  {name} {dtype}: measuring {who}")
                found.append(_in_a_fresh_process(case, name, dtype, who, options.threads))
            _add_figures(found)
            rows += found
    return rows


def _add_figures(rows: list[Row]) -> None:
    peaks = {r.contestant: r.figures["peak_over_bytes"] for r in rows if r.figures}
    if not peaks.get(REFERENCE):
        return
    for row in rows:
        if row.figures:
            row.figures["share_of_reference"] = row.figures["peak_over_bytes"] / peaks[REFERENCE]


def main() -> int:
    parser = argparse.ArgumentParser(description="one contestant, measured in this process")
    parser.add_argument("case", choices=list(SETS))
    parser.add_argument("workload")
    parser.add_argument("dtype")
    parser.add_argument("name")
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    row = measure(given.case, given.workload, given.dtype, given.name, given.threads)
    print(json.dumps(asdict(row)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
