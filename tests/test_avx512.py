"""What ``make test-avx512`` makes of what it sees; the target itself checks the kernels."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "avx512"
EMULATED = ["avx512", "avx512_vpopcnt", "avx512_vnni"]
NEWEST = "avx512_bf16 avx512_vpopcnt avx512_vnni avx512 avx2_vnni avx2"
GOOD = [*(f"gelu {copy} ok" for copy in EMULATED), "kernel_check: exit 0"]


def test_every_kernel_has_cases():
    kernels = {f.name.removesuffix("_kernel.cpp") for f in (ROOT / "csrc/cpu").glob("*_kernel.cpp")}
    cases = {f.stem for f in (FOLDER / "cases").glob("*.cpp")}
    assert kernels <= cases, "each kernel needs tests/avx512/cases/<stem>.cpp"
    stems = {f.stem for f in (ROOT / "csrc/cpu").glob("*.cpp")}
    assert cases <= stems, "cases of a stem that is gone"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import run

    monkeypatch.setattr("run.platform.machine", lambda: "x86_64")
    return run


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A processor without AVX-512, whose other copies are right."""
    program(tmp_path / "kernel_check", "[ $# = 0 ] || echo avx2")
    program(tmp_path / "kernel_check_planted", "true")
    return tmp_path


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (GOOD, 0),
        (GOOD[:-1], 1),  # it never ended
        ([*GOOD[:-1], "kernel_check: exit 1"], 1),
        ([GOOD[0], GOOD[-1]], 1),  # a copy never ran
        ([GOOD[-1]], 1),
        ([], 1),
    ],
)
def test_a_machine_is_believed_only_when_it_names_every_copy(run, build, monkeypatch, lines, code):
    monkeypatch.setattr("machine.provide", lambda folder: None)
    monkeypatch.setattr("machine.run", lambda *_: lines)
    assert run.main([str(build)]) == code


def test_without_an_emulator(run, build, monkeypatch, capsys):
    monkeypatch.setattr("machine.provide", lambda folder: "bochs missing")
    assert run.main([str(build)]) == 1
    assert run.main([str(build), "--if-possible"]) == 0
    assert f"NOT RUN: {', '.join(EMULATED)}: bochs missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("native", "more", "expected"),
    [
        (NEWEST, [], None),
        (NEWEST, ["--emulate"], EMULATED),
        ("avx512 avx2", [], ["avx512_vpopcnt", "avx512_vnni"]),
    ],
)
def test_what_the_processor_has_is_not_emulated(run, build, monkeypatch, native, more, expected):
    asked = []
    monkeypatch.setattr("machine.provide", lambda folder: None)
    monkeypatch.setattr("machine.run", lambda _, arguments, *more: asked.append(arguments) or GOOD)
    program(build / "kernel_check", f"[ $# = 0 ] || echo {native}")
    assert run.main([str(build), *more]) == 0
    assert asked == ([] if expected is None else [["--copies", ",".join(expected)]])


@pytest.mark.parametrize("name", ["kernel_check", "kernel_check_planted"])
def test_a_failure_here_is_one(run, build, name):
    program(build / name, '[ "$1" = --list ] || exit 1')
    assert run.main([str(build)]) == 1
