"""compute-sanitizer over every kernel: reads and writes out of bounds, races, wrong barriers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from .exercise import UNFINISHED
from .libraries import Runner, toolkit
from .process import FAILED, NOT_RUN, PASSED, Deadline, Ended, Step, run

TOOLS = ("memcheck", "racecheck", "synccheck")
LIMIT_S, LEAST_S = 120.0, 45.0
#: seconds of the limit in which the tool starts and sums up; the program stops by itself before
START_S = 30.0
#: the exit status that says the tool, not the program, found something
FOUND = 77
PROGRAM = [sys.executable, "-m", "bench.gpu_check.exercise"]


def command(program: str, tool: str, limit_s: float) -> list[str]:
    """API errors are left out: torch asks some questions whose answer is an error, and filbert's
    own calls raise."""
    found = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    found += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [*found, *PROGRAM, "--limit-s", f"{limit_s - START_S:.0f}"]


def _said(output: str, words: Sequence[str]) -> list[str]:
    return [
        line.strip(" =")[:200]
        for line in output.splitlines()
        if line.startswith("=====") and any(word in line for word in words)
    ]


def outcome(tool: str, ended: Ended) -> tuple[str, list[str]]:
    """Status and details of one tool's run."""
    summary = _said(ended.output, ("SUMMARY",))
    if "Device not supported" in ended.output:
        return NOT_RUN, ["compute-sanitizer does not support this device"]
    if ended.cut:
        return FAILED, [ended.how, *summary]
    if ended.status == 0:
        counted = [line for line in ended.output.splitlines() if line.endswith(UNFINISHED)]
        # What it did not come to may be wrong; nothing that it saw is.
        return (NOT_RUN if counted else PASSED), [*summary, *counted] or ended.last_lines(1)
    if ended.status == FOUND:
        found = _said(ended.output, ("Invalid", "hazard", "Hazard", "Error", "error", " at "))
        return FAILED, [*summary, *found[:8]]
    return FAILED, [ended.how, *summary, *ended.last_lines()]


def check(
    tool: str, deadline: Deadline, env: Mapping[str, str], runner: Runner = run
) -> tuple[Step, str]:
    """One tool's step, and everything it printed."""
    name = f"sanitizer: {tool}"
    program = toolkit("compute-sanitizer")
    if program is None:
        why = "compute-sanitizer is neither on PATH nor in the CUDA toolkit's folder"
        return Step(name, NOT_RUN, details=[why]), ""
    limit = deadline.limit(LIMIT_S, LEAST_S)
    if limit is None:
        return Step(name, NOT_RUN, details=["no time was left"]), ""
    # One allocation for each tensor: inside torch's pools nothing is out of bounds.
    env = {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ended = runner(command(program, tool, limit), limit, env)
    status, details = outcome(tool, ended)
    data = {"cut": True} if ended.cut else {}
    return Step(name, status, ended.seconds, details, data), ended.output


def turns(
    deadline: Deadline, env: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], tuple[Step, str]]]]:
    """Each tool's step's name, and what runs it."""
    for tool in TOOLS:
        yield f"sanitizer: {tool}", partial(check, tool, deadline, env)
