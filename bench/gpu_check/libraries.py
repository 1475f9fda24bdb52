"""Which compiled libraries are checked: some built elsewhere, or else built here."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..environment import ROOT
from ..results import without_paths
from .process import FAILED, PASSED, Deadline, Ended, Step, run

NAMES = ("libfilbert_ops.so", "libfilbert_cuda.so")
PROBE_LIMIT_S, BUILD_LIMIT_S = 100.0, 240.0
Runner = Callable[[Sequence[str], float, Mapping[str, str]], Ended]


def environment_of(folder: Path | None) -> dict[str, str]:
    """What programs of this tree are run with: its own Python files and those libraries."""
    env = dict(os.environ)
    paths = [str(ROOT / "python"), *filter(None, [env.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if folder is not None:
        env["FILBERT_LIBRARY_DIR"] = str(folder)
    return env


def toolkit(program: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where toolkits are installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / part for home in homes if home for part in ("bin", program)]
    return shutil.which(program) or next(
        (found for folder in folders if (found := shutil.which(program, path=str(folder)))), None
    )


def search_path() -> str:
    """PATH, and before it the folder of this Python, where pip puts programs such as CMake."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def build_commands(folder: Path, architecture: str) -> list[list[str]]:
    """Configures and builds the two libraries for one GPU; no Python module, so no pybind11."""
    cmake = shutil.which("cmake", path=search_path()) or "cmake"
    configure = [
        cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release",
        "-DFILBERT_CUDA=ON", f"-DFILBERT_CUDA_ARCHS={architecture}",
        "-DFILBERT_PYTHON_MODULE=OFF", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    if (ninja := shutil.which("ninja", path=search_path())) is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return [configure, [cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]]


def digests(folder: Path) -> dict[str, str]:
    """The first digits of each library's SHA-256, to tell builds apart."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
        for name in NAMES
        if (folder / name).exists()
    }


def prebuilt(needed: Sequence[str]) -> list[Path]:
    """Folders of ``build/`` that hold all of these libraries, what was built last first."""
    found = (path.parent for path in (ROOT / "build").glob(f"*/{needed[-1]}"))
    complete = [folder for folder in found if all((folder / name).exists() for name in needed)]
    return sorted(complete, key=lambda folder: (folder / needed[-1]).stat().st_mtime, reverse=True)


class Libraries:
    """Finds a folder whose libraries run an attention on the device, or makes one.

    Args:
        given: the folder to try, and no other before they are built; whatever folder of ``build/``
            has them if None.
        device: ``cuda``, or ``cpu`` in a rehearsal, which never builds.
        runner: runs programs; replaced in tests.
    """

    def __init__(self, given: Path | None, device: str, runner: Runner = run) -> None:
        self.device, self._run = device, runner
        self._needed = NAMES if device != "cpu" else NAMES[:1]
        self._given = given.resolve() if given else None
        #: the folder that works, once it is known
        self.folder: Path | None = None
        self.log: list[tuple[str, str]] = []

    def find(self, deadline: Deadline) -> Step:
        """The step: ``data`` says where the libraries are from and why others were not taken."""
        left, tried = deadline.left_s, []
        for folder in [self._given] if self._given else prebuilt(self._needed):
            origin = "given" if self._given else f"build/{folder.name}"
            reason, built_for = self._probe(folder, deadline)
            if reason is None:
                return self._found(folder, origin, built_for, left - deadline.left_s, tried)
            tried.append(f"{origin}: {reason}")
        if not tried:
            tried.append(f"build/: no {' and no '.join(self._needed)} in any folder of it")
        if self.device != "cpu":
            folder = ROOT / "build" / "gpu"
            reason, built_for = self._build(folder, deadline), ""
            if reason is None:
                reason, built_for = self._probe(folder, deadline)
            if reason is None:
                return self._found(folder, "built here", built_for, left - deadline.left_s, tried)
            tried.append(f"built here: {reason}")
        return self._step(FAILED, left - deadline.left_s, tried, {})

    def _found(
        self, folder: Path, origin: str, probe: str, seconds: float, tried: list[str]
    ) -> Step:
        self.folder = folder
        data = {"origin": origin, "probe": probe, "sha256": digests(folder)}
        return self._step(PASSED, seconds, tried, data)

    def _step(self, status: str, seconds: float, tried: list[str], data: dict) -> Step:
        tried = [without_paths(reason) for reason in tried]
        details = [f"{data['origin']}: {data['probe']}"] if data else []
        return Step("libraries", status, seconds, details + tried, {**data, "tried": tried})

    def _probe(self, folder: Path, deadline: Deadline) -> tuple[str | None, str]:
        """Why the folder's libraries do not work here, or None and what the probe said."""
        absent = [name for name in self._needed if not (folder / name).exists()]
        if absent:
            return f"no {' and no '.join(absent)} in {folder}", ""
        limit = deadline.limit(PROBE_LIMIT_S, 5.0)
        if limit is None:
            return "no time was left to try them", ""
        command = [sys.executable, "-m", "bench.gpu_check.exercise", "--quick"]
        ended = self._run([*command, "--device", self.device], limit, environment_of(folder))
        self.log.append((f"libraries in {folder.name}", ended.output))
        lines = ended.last_lines()
        if ended.status == 0 and not ended.cut:
            return None, lines[-1] if lines else ""
        return f"{ended.how}: {lines[-1] if lines else 'no message'}", ""

    def _build(self, folder: Path, deadline: Deadline) -> str | None:
        """Why the libraries could not be built, or None."""
        env = environment_of(None)
        nvcc = toolkit("nvcc")
        if nvcc is None and "CUDACXX" not in env:
            return "no nvcc on PATH or in the CUDA toolkit's folder"
        if nvcc is not None:
            env.setdefault("CUDACXX", nvcc)
        major, minor = torch.cuda.get_device_capability()
        for command in build_commands(folder, f"{major}{minor}"):
            limit = deadline.limit(BUILD_LIMIT_S, 10.0)
            if limit is None:
                return "no time was left to build them"
            ended = self._run(command, limit, env)
            self.log.append((" ".join(command[:2]), ended.output))
            if ended.status or ended.cut:
                return f"{Path(command[0]).name} {ended.how}: {' / '.join(ended.last_lines())}"
        return None
