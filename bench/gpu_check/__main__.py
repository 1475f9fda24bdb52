"""``python -m bench.gpu_check [--only tests|sanitizers|bench] [--resume] [--out DIR] ...``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu-check: needs a CUDA PyTorch, and python has none: {error}")

from ..environment import ROOT, environment
from ..results import Report
from ..runner import say
from . import benches, earlier, libraries, sanitizer, testing
from .process import Deadline, Step
from .report import Findings

#: seconds for everything: machines that are lent by the minute often stop a command at 600
LIMIT_S = 570.0
#: what can be asked for alone, in the order it is done
PARTS = ("tests", "sanitizers", "bench")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description="Checks and times the CUDA kernels on this machine's GPU, in ten minutes.",
    )
    out = os.environ.get("OUT") or "build/gpu-check"
    top.add_argument("--out", type=Path, default=Path(out), help="folder for what it leaves behind")
    given = os.environ.get("FILBERT_LIBRARY_DIR")
    top.add_argument(
        "--libraries", type=Path, default=Path(given) if given else None,
        help="folder with libfilbert_ops.so and libfilbert_cuda.so; default: whatever folder of "
        "build/ has them, and if those do not run here, new ones in build/gpu",
    )  # fmt: skip
    top.add_argument(
        "--only", choices=PARTS, action="append",
        help="this part and no other; may be given twice",
    )  # fmt: skip
    top.add_argument(
        "--resume", action="store_true",
        help="leave out what an earlier call in the same --out folder finished: what passed, while "
        "libraries and GPU are the same; what failed, while the tree is the same too",
    )  # fmt: skip
    top.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for everything")
    top.add_argument(
        "--rehearse", action="store_true",
        help="run the same steps on the CPU, as small as they come: tests this script, not a GPU",
    )  # fmt: skip
    return top


def why_no_gpu() -> str | None:
    """Why nothing can be checked here, or None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) sees no GPU"
    return None


class GpuCheck:
    """The steps, in order. What is known is on disk after each of them."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.rehearsal: bool = given.rehearse
        self.device = "cpu" if self.rehearsal else "cuda"
        self.out: Path = given.out
        self.parts: Sequence[str] = given.only or PARTS
        self.resume: bool = given.resume
        self.deadline = Deadline(given.limit_s)
        self.libraries = libraries.Libraries(given.libraries, self.device)
        self.findings = Findings()

    def run(self) -> Findings:
        self._took(self.libraries.find(self.deadline))
        self.findings.outputs += self.libraries.log
        folder = self.libraries.folder
        if folder is not None:
            # Only now is it safe to load them into this process too, which tells what they are.
            os.environ["FILBERT_LIBRARY_DIR"] = str(folder)
            sys.path.insert(0, str(ROOT / "python"))
        self.findings.environment = environment(self.device, torch.get_num_threads())
        if folder is not None:
            self.findings.digests = earlier.digests(folder)
            if self.resume:
                say(f"gpu-check: {self.findings.keep(earlier.load(self.out))}")
            env = libraries.environment_of(folder)
            for part, run in (
                ("tests", self._test), ("sanitizers", self._sanitize), ("bench", self._time)
            ):  # fmt: skip
                if part in self.parts:
                    run(env)
        self.findings.save(self.out)
        return self.findings

    def _took(self, step: Step, output: str = "", report: Report | None = None) -> None:
        say(f"gpu-check: {step.name}: {step.status} ({step.seconds:.0f} s)")
        self.findings.steps.append(step)
        if report is not None:
            self.findings.add(step.name, report)
        if output:
            self.findings.outputs.append((step.name, output))
        if self.findings.environment:
            self.findings.save(self.out)

    def _together(self, turns: Iterable[tuple[str, Callable[[], tuple[Step, str]]]]) -> None:
        """Runs what is not timed several at a time, and tells it in its order."""
        with ThreadPoolExecutor(testing.workers()) as pool:
            queued = [pool.submit(turn) for name, turn in turns if not self.findings.has(name)]
            for future in queued:
                self._took(*future.result())

    def _test(self, env: dict[str, str]) -> None:
        """Every kernel once, whose failure explains those of the tests, then the tests."""
        count = testing.workers()
        env = {**env, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        files = testing.REHEARSED if self.rehearsal else testing.files()
        keyword = testing.ANYWHERE if self.rehearsal else testing.CUDA
        first = testing.EXERCISE, lambda: testing.exercise(self.device, self.deadline, env)
        self._together([first, *testing.turns(files, keyword, self.deadline, env)])

    def _sanitize(self, env: dict[str, str]) -> None:
        """The tools share the GPU with each other and with nothing else."""
        if not self.rehearsal:
            self._together(sanitizer.turns(self.deadline, env))

    def _time(self, env: dict[str, str]) -> None:
        """The cases, one after the other: nothing else runs meanwhile."""
        for bench in benches.rehearsal() if self.rehearsal else benches.plan():
            if not self.findings.has(bench.step):
                step, report, output = benches.time_one(bench, self.deadline, env)
                self._took(step, output, report)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    # A shell that starts this in the background may have switched interrupts off, and programs
    # inherit that; they are stopped by one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not given.rehearse and (why := why_no_gpu()) is not None:
        print(f"gpu-check: needs an NVIDIA GPU and a CUDA PyTorch; {why}")
        return 1
    findings = GpuCheck(given).run()
    print(findings.summary())
    print(f"wrote gpu-check.json, gpu-check.md and gpu-check.log to {given.out}")
    return 0 if findings.passed else 1


if __name__ == "__main__":
    sys.exit(main())
