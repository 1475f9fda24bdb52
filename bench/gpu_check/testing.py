"""The test suite on the GPU, a process for each file, and every kernel once before it."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from ..environment import ROOT
from ..results import without_paths
from .libraries import Runner
from .process import FAILED, NOT_RUN, PASSED, Deadline, Ended, Step, run

#: a test that runs once for each backend, or on whatever passes for a GPU
ON_BACKENDS = re.compile(r"^def test_\w+\([^)]*\b(backend|gpu)\b", re.MULTILINE)
#: the backend's name stands in a test's id; hostcuda runs the same source without a GPU
CUDA = "cuda and not hostcuda"
#: tests that need neither a GPU nor ``filbert._C``, to rehearse with
ANYWHERE = "test_refuses"
REHEARSED = ("ops/test_gather_rows.py",)
LIMIT_S, LEAST_S = 150.0, 15.0
EXERCISE = "every kernel once"
#: failures that are shown in the table; the log has them all
SHOWN = 12


@dataclass
class Counts:
    """What a junit file says."""

    tests: int = 0
    failures: int = 0
    errors: int = 0
    skipped: int = 0
    #: each failure's test and the first line of its message
    failed: list[str] = field(default_factory=list)

    @property
    def passed(self) -> int:
        return self.tests - self.failures - self.errors - self.skipped

    def __str__(self) -> str:
        bad = self.failures + self.errors
        return f"{self.passed} passed, {bad} failed, {self.skipped} skipped"


def read_junit(path: Path) -> Counts | None:
    """Counts and failures of a junit file; None where there is none or it is cut short."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    found = Counts()
    for case in root.iter("testcase"):
        found.tests += 1
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("tests.")
        for kind in ("failure", "error", "skipped"):
            mark = case.find(kind)
            if mark is None:
                continue
            if kind == "skipped":
                found.skipped += 1
                break
            found.failures += kind == "failure"
            found.errors += kind == "error"
            message = (mark.get("message") or mark.text or "no message").strip()
            found.failed.append(without_paths(f"{name}: {message.splitlines()[0][:200]}"))
            break
    return found


def command(file: str, keyword: str, junit: Path) -> list[str]:
    """pytest on one file. The tree's own options would print every local tensor of a failure, and
    turn a warning of another version of a library into one."""
    return [
        sys.executable, "-m", "pytest", f"tests/{file}", "-k", keyword, "-q", "--tb=short",
        "-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider",
        f"--junitxml={junit}",
    ]  # fmt: skip


def outcome(file: str, ended: Ended, counts: Counts | None) -> Step:
    """The step of one file."""
    if counts is None:
        details = [without_paths(d) for d in (f"{ended.how}, no report", *ended.last_lines(1))]
        cut = {"cut": True} if ended.cut else {}
        return Step(f"tests: {file}", FAILED, ended.seconds, details, cut)
    details = [str(counts)]
    good = ended.status == 0 and not ended.cut and counts.passed > 0
    if counts.tests == 0:
        details = ["no test of this backend was found"]
    elif ended.cut:
        details.append(f"{ended.how}; the rest did not run")
    elif not good and not counts.failed:
        details.append(ended.how)
    details += counts.failed[:SHOWN]
    if len(counts.failed) > SHOWN:
        details.append(f"and {len(counts.failed) - SHOWN} more")
    data = {
        "passed": counts.passed,
        "failed": counts.failures + counts.errors,
        "skipped": counts.skipped,
        "failures": counts.failed,
        **({"cut": True} if ended.cut else {}),
    }
    return Step(f"tests: {file}", PASSED if good else FAILED, ended.seconds, details, data)


def files() -> list[str]:
    """The files that have a test for the GPU, the longest first: they are begun in this order."""
    folder = ROOT / "tests"
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("test_*.py")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in found.items()}
    chosen = sorted(name for name, text in texts.items() if ON_BACKENDS.search(text))
    return sorted(chosen, key=lambda name: len(texts[name]), reverse=True)


def run_file(
    file: str, keyword: str, limit_s: float | None, env: Mapping[str, str]
) -> tuple[Step, str]:
    """One file's step, and everything that pytest printed."""
    if limit_s is None:
        return Step(f"tests: {file}", NOT_RUN, details=["no time was left"]), ""
    if not (ROOT / "tests" / file).exists():
        return Step(f"tests: {file}", NOT_RUN, details=["this tree has no such file"]), ""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        ended = run(command(file, keyword, junit), limit_s, env)
        return outcome(file, ended, read_junit(junit)), ended.output


def exercise(
    device: str, deadline: Deadline, env: Mapping[str, str], runner: Runner = run
) -> tuple[Step, str]:
    """The step of every kernel on a few shapes, without a sanitizer, and what it printed."""
    limit = deadline.limit(LIMIT_S, LEAST_S)
    if limit is None:
        return Step(EXERCISE, NOT_RUN, details=["no time was left"]), ""
    command = [sys.executable, "-m", "bench.gpu_check.exercise", "--device", device]
    ended = runner(command, limit, env)
    good = ended.status == 0 and not ended.cut
    details = [*([] if good else [ended.how]), *ended.last_lines(1 if good else SHOWN)]
    data = {"cut": True} if ended.cut else {}
    return Step(EXERCISE, PASSED if good else FAILED, ended.seconds, details, data), ended.output


def turns(
    files: Sequence[str], keyword: str, deadline: Deadline, env: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], tuple[Step, str]]]]:
    """Each file's step's name, and what runs it. A file's limit is taken when its turn comes."""
    for file in files:

        def turn(file: str = file) -> tuple[Step, str]:
            return run_file(file, keyword, deadline.limit(LIMIT_S, LEAST_S), env)

        yield f"tests: {file}", turn


def workers() -> int:
    """Programs at a time: they share the GPU, and each wants a few cores."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))
