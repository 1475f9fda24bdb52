"""The bindings against the headers of the oldest torch that is promised."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("headers", ROOT / "cmake" / "torch_headers.py")
headers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(headers)
OLDEST = "2.10.0"


@pytest.fixture
def include():
    folder = headers.folder_of(OLDEST) / "torch" / "include"
    if not folder.exists():
        pytest.skip(f"{folder.parents[1].name} is not in build/: make test downloads it")
    return folder


def test_the_oldest_torch_is_the_one_that_is_promised():
    promised = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"{promised}.0" == OLDEST
    assert f"build/torch-{OLDEST}" in (ROOT / "Makefile").read_text()
    major, minor = map(int, promised.split("."))
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}" in headers.TARGET
    assert headers.TARGET.removeprefix("-D") in (ROOT / "cmake" / "TorchStable.cmake").read_text()


def test_every_file_that_sees_torch_is_compiled():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    seeing = {p.name for p in files if re.search(r'#include [<"]torch/', p.read_text())}
    assert {name.split()[1] for name in headers.commands(ROOT)} == seeing


def test_the_bindings_compile_with_the_oldest_torch(include):
    assert headers.wrong(include) == {}


@pytest.mark.parametrize("library", ["libfilbert_ops.so", "libfilbert_cuda.so"])
def test_libraries_built_with_another_torch_call_nothing_that_the_oldest_lacks(include, library):
    built = ROOT / "build" / "dev" / library
    if not built.exists():
        pytest.skip(f"{library} is not in build/dev: there is no nvcc, or it was built elsewhere")
    assert headers.undeclared(include, built) == []


def test_what_is_missing_is_named(include, tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "ROOT", tmp_path)
    source = tmp_path / "csrc" / "torch" / "new.cpp"
    source.parent.mkdir(parents=True)
    source.write_text(
        "#include <torch/csrc/stable/library.h>\nvoid f() { STABLE_TORCH_ERROR_CODE_CHECK(0); }\n"
    )
    found = headers.wrong(include)
    assert set(found) == {"filbert_ops new.cpp", "filbert_cuda new.cpp"}
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in found["filbert_ops new.cpp"]
