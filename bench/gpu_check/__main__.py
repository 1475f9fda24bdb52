"""``python -m bench.gpu_check [--out DIR] [--libraries DIR]``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu-check: needs a CUDA PyTorch, and python has none: {error}")

from ..environment import ROOT, environment
from ..runner import say
from . import benches, libraries, sanitizer, testing
from .process import Deadline, Step
from .report import Findings

#: seconds for everything
LIMIT_S = 480.0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description="Checks and times the CUDA kernels on this machine's GPU, in eight minutes.",
    )
    out = os.environ.get("OUT") or "build/gpu-check"
    top.add_argument("--out", type=Path, default=Path(out), help="folder for what it leaves behind")
    given = os.environ.get("FILBERT_LIBRARY_DIR")
    top.add_argument(
        "--libraries", type=Path, default=Path(given) if given else None,
        help="folder with libfilbert_ops.so and libfilbert_cuda.so; default: build/dev, and if "
        "those do not run here, new ones in build/gpu",
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
            env = libraries.environment_of(folder)
            self._check(env)
            self._time(env)
        self.findings.save(self.out)
        return self.findings

    def _took(self, step: Step, output: str = "") -> None:
        say(f"gpu-check: {step.name}: {step.status} ({step.seconds:.0f} s)")
        self.findings.steps.append(step)
        if output:
            self.findings.outputs.append((step.name, output))

    def _check(self, env: dict[str, str]) -> None:
        """Tests and sanitizers: nothing here is timed, so they share the GPU."""
        count = testing.workers()
        env = {**env, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
        files = ("test_gather_rows.py",) if self.rehearsal else testing.FILES
        keyword = testing.ANYWHERE if self.rehearsal else testing.CUDA
        with ThreadPoolExecutor(count) as pool:
            queued = testing.start(pool, files, keyword, self.deadline, env)
            if not self.rehearsal:
                queued += [
                    pool.submit(sanitizer.check, tool, self.deadline, env)
                    for tool in sanitizer.TOOLS
                ]
            for future in queued:
                self._took(*future.result())
                self.findings.save(self.out)

    def _time(self, env: dict[str, str]) -> None:
        """The cases, one after the other: nothing else runs meanwhile."""
        for bench in benches.rehearsal() if self.rehearsal else benches.plan():
            step, report, output = benches.time_one(bench, self.deadline, env)
            if report is not None:
                self.findings.add(report)
            self._took(step, output)
            self.findings.save(self.out)


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
