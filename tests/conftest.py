"""Backends: one test body runs over every way filbert can compute here.

``cpu-ISA`` are the CPU kernels, one instruction set each. ``hostcuda-SEED`` are the CUDA kernels,
run by the host (see tests/hostcuda), with their threads scheduled in an order drawn from the seed.
``cuda`` are the CUDA kernels on a GPU, where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from filbert import _load, ops

ISAS = list(_load.C.isas()) if _load.C is not None else []
#: 0 is warps and lanes in their order
SEEDS = (0, 1, 2)


def _load_hostcuda() -> str | None:
    """Registers the operators of ``filbert_hostcuda``; says why it cannot."""
    if _load.folder is None:
        return _load.missing["ops"]
    library = _load.folder / "libfilbert_hostcuda.so"
    if not library.exists():
        return "built without FILBERT_HOSTCUDA; make test builds with it"
    torch.ops.load_library(str(library))
    ops.register("filbert_hostcuda")
    return None


HOSTCUDA_MISSING = _load_hostcuda()
CUDA = torch.cuda.is_available() and "cuda" not in _load.missing
BACKENDS = [
    *(f"cpu-{isa}" for isa in ISAS),
    *(f"hostcuda-{seed}" for seed in SEEDS if HOSTCUDA_MISSING is None),
    *(["cuda"] if CUDA else []),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out float16 on the CPU: there is no such kernel, and a test of its own says so."""
    kept, left = [], []
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        on_cpu = str(params.get("backend", "")).startswith("cpu-")
        (left if on_cpu and params.get("dtype") == torch.float16 else kept).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture(params=BACKENDS or ["missing"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes filbert's operators run one backend, and new tensors lie where it wants them."""
    kind, _, choice = request.param.partition("-")
    if kind == "missing":
        pytest.fail(f"the compiled library is missing: {_load.missing['ops']}")
    if kind == "cpu":
        before = _load.C.isa()
        _load.C.select_isa(choice)
        yield kind
        _load.C.select_isa(before)
    elif kind == "hostcuda":
        kernels = torch.ops.filbert_hostcuda
        monkeypatch.setattr(ops, "_kernels", lambda: kernels)
        monkeypatch.setattr(ops, "_has_tiles", lambda cu_seqlens: True)
        kernels.set_seed(int(choice))
        yield kind
    else:
        with torch.device("cuda"):
            yield kind


@pytest.fixture
def gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where models for the CUDA kernels go. The host passes for a GPU, and converts as one."""
    if backend == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr("filbert.integrations.transformers._device_reasons", lambda *_: [])
    monkeypatch.setattr(ops, "head_dims", lambda _, own=ops.head_dims: own(torch.device("cuda")))
    return torch.device("cpu")


@pytest.fixture
def hostcuda() -> Iterator[object]:
    """The harness itself: the operators of ``filbert_hostcuda`` and its switches."""
    if HOSTCUDA_MISSING is not None:
        pytest.fail(f"libfilbert_hostcuda is missing: {HOSTCUDA_MISSING}")
    kernels = torch.ops.filbert_hostcuda
    kernels.set_seed(0)
    yield kernels
    kernels.record(False)
    kernels.set_seed(0)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
