"""Other programs, each with a time limit, and all together with one."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..environment import ROOT

#: seconds that an interrupted program has to write down what it knows
GRACE_S = 8.0
#: seconds kept back from every step, to write the report
RESERVE_S = 5.0
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


@dataclass
class Step:
    """One part of the check and how it ended."""

    name: str
    #: ``passed``, ``failed`` or ``not run``
    status: str
    seconds: float = 0.0
    #: what a reader of the table should know: a count, a reason, the first lines of failures
    details: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


class Deadline:
    """The time that is left for everything."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic() - RESERVE_S)

    def limit(self, most_s: float, least_s: float) -> float | None:
        """Seconds that a step may take, or None where less than ``least_s`` are left."""
        left = self.left_s - GRACE_S
        return None if left < least_s else min(most_s, left)


@dataclass(frozen=True)
class Ended:
    """How a program ended."""

    status: int
    output: str
    seconds: float
    #: it was stopped at its limit
    cut: bool

    @property
    def how(self) -> str:
        """In words, for a program that did not succeed."""
        if self.cut:
            return f"stopped after {self.seconds:.0f} s"
        if self.status < 0:
            return f"ended by signal {signal.Signals(-self.status).name}"
        return f"ended with status {self.status}"

    def last_lines(self, count: int = 3) -> list[str]:
        lines = [line.rstrip() for line in self.output.splitlines() if line.strip()]
        return [line[:300] for line in lines[-count:]]


def run(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Ended:
    """Runs a program in the tree's root; at its limit it is interrupted, then killed.

    Everything that it started goes with it: it has a process group of its own. It hears interrupts
    even where this process does not, as one that a script has started in the background.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                list(command), cwd=ROOT, env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_hear_interrupts if ignored else None,
            )  # fmt: skip
        except OSError as error:
            return Ended(127, f"{command[0]}: {error}", 0.0, False)
        cut = False
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            cut = True
            _stop(process)
        except BaseException:
            _signal_group(process, signal.SIGKILL)
            raise
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    return Ended(process.returncode, text, time.monotonic() - start, cut)


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _stop(process: subprocess.Popen[bytes]) -> None:
    _signal_group(process, signal.SIGINT)  # pytest then still writes its report
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        process.wait()
    _signal_group(process, signal.SIGKILL)  # what the program left behind
