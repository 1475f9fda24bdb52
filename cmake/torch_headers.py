"""Compiles the bindings against the headers of another torch: python torch_headers.py VERSION ...

The package promises every torch from 2.10 on, and an environment has one. Headers are enough to see
that the bindings use nothing that another version lacks: no GPU, no nvcc, none of torch's own
dependencies. They are taken from a wheel of that version, the smallest that there is for any
platform: the headers of the stable ABI are the same in all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: the oldest torch that pyproject.toml promises, as libraries are told it
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
#: the libraries: what a file is compiled with, and which files of csrc see torch
LIBRARIES = {
    "filbert_ops": ([], ("ops.cpp", "torch/*.cpp", "torch/cpu/*.cpp", "torch/shared/parallel.cpp")),
    "filbert_cuda": (
        ["-DUSE_CUDA", "-DFILBERT_CUDA", '-DFILBERT_CUDA_ARCHITECTURES="sm"'],
        ("cuda/device/architectures.cu", "torch/*.cpp"),
    ),
}
#: of 80 MB, since it has no CUDA kernels, and of 500 to 900 MB where a version lacks the first
PLATFORMS = ("macosx_11_0_arm64", "manylinux_2_28_x86_64")


def folder_of(version: str) -> Path:
    return ROOT / "build" / f"torch-{version}"


def fetch(version: str) -> Path:
    """The folder with that version's headers, downloaded if it is not there."""
    include = folder_of(version) / "torch" / "include"
    if include.exists():
        return include
    for platform in PLATFORMS:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [
                    sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                    "--no-cache-dir", "--only-binary=:all:", "--python-version", "3.12",
                    "--platform", platform, "--dest", folder, f"torch=={version}",
                ],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                continue
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                names = [n for n in packed.namelist() if n.startswith("torch/include/")]
                # Complete or not there: an interrupted one must not be taken for the whole.
                packed.extractall(Path(folder) / "new", names)
            folder_of(version).parent.mkdir(exist_ok=True)
            shutil.move(Path(folder) / "new", folder_of(version))
        return include
    raise SystemExit(f"torch {version}: pip cannot download a wheel of it\n{done.stderr.strip()}")


def commands(include: Path) -> dict[str, list[str]]:
    """Every file that sees torch, by library and name, and how it is compiled."""
    compiler = os.environ.get("CXX") or "c++"
    common = ["-std=gnu++17", "-fsyntax-only", "-fvisibility=hidden"]
    common += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    found = {}
    for library, (definitions, patterns) in LIBRARIES.items():
        for source in (s for pattern in patterns for s in sorted((ROOT / "csrc").glob(pattern))):
            found[f"{library} {source.name}"] = [
                compiler, *common, TARGET, *definitions, "-isystem", str(include),
                "-I", str(ROOT / "csrc"), "-x", "c++", str(source),
            ]  # fmt: skip
    return found


def wrong(include: Path) -> dict[str, str]:
    """What the compiler says of each file that does not compile."""

    def compiled(command: Sequence[str]) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    wanted = commands(include)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = dict(zip(wanted, pool.map(compiled, wanted.values()), strict=True))
    return {name: text for name, text in said.items() if text}


def undeclared(include: Path, library: Path) -> list[str]:
    """Functions of torch's C interface that a built library calls and these headers lack."""
    names = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", str(library)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    needed = set(re.findall(r"\bU ((?:aoti_)?torch_\w+)", names))
    headers = [
        *(include / "torch" / "csrc" / "inductor" / "aoti_torch").rglob("*.h"),
        *(include / "torch" / "csrc" / "stable").rglob("*.h"),
    ]
    known = set(re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in headers)))
    return sorted(needed - known)


def main(versions: Sequence[str]) -> int:
    bad = False
    for version in versions:
        found = wrong(fetch(version))
        for name, said in found.items():
            print(f"torch {version}, {name}:\n{said}")
        print(f"torch {version}: {len(found)} of {len(commands(Path()))} files do not compile")
        bad |= bool(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
