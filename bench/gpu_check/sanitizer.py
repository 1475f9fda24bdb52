"""compute-sanitizer over every kernel: reads and writes out of bounds, and races."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from .libraries import Runner, toolkit
from .process import FAILED, NOT_RUN, PASSED, Deadline, Ended, Step, run

TOOLS = ("memcheck", "racecheck")
LIMIT_S, LEAST_S = 90.0, 20.0
#: the exit status that says the tool, not the program, found something
FOUND = 77
PROGRAM = [sys.executable, "-m", "bench.gpu_check.exercise"]


def command(program: str, tool: str) -> list[str]:
    """API errors are left out: torch asks some questions whose answer is an error, and filbert's
    own calls raise."""
    found = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    return [*found, *(["--report-api-errors", "no"] if tool == "memcheck" else []), *PROGRAM]


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
        return PASSED, summary or ended.last_lines(1)
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
    ended = runner(command(program, tool), limit, {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    status, details = outcome(tool, ended)
    return Step(name, status, ended.seconds, details), ended.output
