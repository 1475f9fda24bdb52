"""Backends: one test body runs over every way filbert can compute here.

``cpu-ISA`` are the CPU kernels, one instruction set each. ``hostcuda-SEED`` are the CUDA kernels,
run by the host (see tests/hostcuda), with their threads scheduled in an order drawn from the seed;
operands end at a guard page, for odd seeds they start at one.
``cuda`` are the CUDA kernels on a GPU, where there is one.

What costs time and finds nothing more is drawn from a test's name, so that every run draws the
same: a case runs over hostcuda in one order of threads and with guards behind the operands (in all
orders, and with guards before them too, if it is marked ``every_order``), and on the CPU with one
thread or two. ``any_isa`` marks what is the same for all instruction sets.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from zlib import crc32

import pytest

# Workers of pytest-xdist share the processor. Programs that tests start are told so, too.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
#: what whoever runs the tests asked for, which stays; None if nothing
OMP_ASKED = os.environ.get("OMP_NUM_THREADS")
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # who waits lets the other workers run

# The server that forks processes starts once, for whichever test needs it first. It holds what
# takes time to import; it does not find the tests themselves.
if "forkserver" in multiprocessing.get_all_start_methods():
    multiprocessing.set_forkserver_preload(["filbert.app.embedding", "pytest", "torch", "tqdm"])

import torch  # noqa: E402 - reads the environment

from filbert import _load, ops  # noqa: E402
from filbert.nn.dense.backends import FLinear  # noqa: E402
from filbert.nn.dense.linear import row_dtype  # noqa: E402
from filbert.ops.shared import calling  # noqa: E402
from filbert.ops.shared.operator import register_namespace  # noqa: E402

ISAS = list(_load.C.isas()) if _load.C is not None else []
#: 0 is warps and lanes in their order; operands start at a guard page for 1, and else end at one
SEEDS = (0, 1, 2)
#: of those, what a case is drawn from: most mistakes of a kernel go past an end
DRAWN_SEEDS = (0, 2)


def _load_hostcuda() -> str | None:
    """Registers the operators of ``filbert_hostcuda``; says why it cannot."""
    if _load.folder is None:
        return _load.missing["ops"]
    library = _load.folder / "libfilbert_hostcuda.so"
    if not library.exists():
        return "built without FILBERT_HOSTCUDA; make test builds with it"
    torch.ops.load_library(str(library))
    register_namespace("filbert_hostcuda")
    return None


HOSTCUDA_MISSING = _load_hostcuda()
CUDA = torch.cuda.is_available() and "cuda" not in _load.missing
BACKENDS = [
    *(f"cpu-{isa}" for isa in ISAS),
    *(f"hostcuda-{seed}" for seed in SEEDS if HOSTCUDA_MISSING is None),
    *(["cuda"] if CUDA else []),
]


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "every_order: over hostcuda with every seed, not with one drawn from the name",
        "any_isa: on one instruction set, drawn from the name, since all give the same",
    ):
        config.addinivalue_line("markers", line)


_BACKEND = r"\b(cpu|hostcuda)-\w+|\bcuda\b"


def _one_of_each(names: list[str], pattern: str) -> set[str]:
    """Of names that differ only in what ``pattern`` matches, one: the others are left out."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[re.sub(pattern, "", name)].append(name)
    return {sorted(same)[crc32(key.encode()) % len(same)] for key, same in alike.items()}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out float16 on the CPU (there is no such kernel, and a test of its own says so), and
    what the marks leave out."""

    def params(item: pytest.Item) -> dict[str, object]:
        return getattr(getattr(item, "callspec", None), "params", {})

    def drop(unwanted: Callable[[pytest.Item], bool]) -> None:
        left = [item for item in items if unwanted(item)]
        if left:
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if not unwanted(item)]

    def is_on(item: pytest.Item, kind: str) -> bool:
        return str(params(item).get("backend", "")).startswith(kind)

    drop(lambda item: is_on(item, "cpu-") and params(item).get("dtype") == torch.float16)
    for kind, mark, marked in (("hostcuda-", "every_order", False), ("cpu-", "any_isa", True)):
        affected = [
            item for item in items
            if is_on(item, kind) and (item.get_closest_marker(mark) is not None) is marked
        ]  # fmt: skip
        drawn = {f"hostcuda-{seed}" for seed in DRAWN_SEEDS}
        names = [
            item.nodeid for item in affected
            if kind == "cpu-" or params(item)["backend"] in drawn
        ]  # fmt: skip
        kept = _one_of_each(names, rf"{kind}\w+")
        unwanted = {item.nodeid for item in affected} - kept
        drop(lambda item, unwanted=unwanted: item.nodeid in unwanted)
    # The backends of a case follow each other, since what they are compared with is computed once.
    first = {}
    for place, item in enumerate(items):
        first.setdefault(re.sub(_BACKEND, "", item.nodeid), place)
    items.sort(key=lambda item: first[re.sub(_BACKEND, "", item.nodeid)])


@pytest.fixture(params=BACKENDS or ["missing"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes filbert's operators run one backend, and new tensors lie where it wants them."""
    kind, _, choice = request.param.partition("-")
    if kind == "missing":
        pytest.fail(f"the compiled library is missing: {_load.missing['ops']}")
    if kind == "cpu":
        before = _load.C.isa(), torch.get_num_threads()
        _load.C.select_isa(choice)
        torch.set_num_threads(1 + crc32(request.node.nodeid.encode()) % 2)
        yield kind
        _load.C.select_isa(before[0])
        torch.set_num_threads(before[1])
    elif kind == "hostcuda":
        kernels = torch.ops.filbert_hostcuda
        monkeypatch.setattr(calling, "kernels", lambda: kernels)
        monkeypatch.setattr("filbert.ops._attn_tiles._has_tiles", lambda cu_seqlens: True)
        kernels.set_seed(int(choice))
        yield kind
    else:
        with torch.device("cuda"):
            yield kind


@pytest.fixture(params=_load.C.isas() if _load.C else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes operators that only the CPU has run one instruction set's copy."""
    before = _load.C.isa()
    _load.C.select_isa(request.param)
    yield request.param
    _load.C.select_isa(before)


@pytest.fixture
def gpu(backend: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where models for the CUDA kernels go. The host passes for a GPU, and converts as one."""
    if backend == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr("filbert.conversion.hugging_face.layers._device_reasons", lambda *_: [])
    monkeypatch.setattr(ops, "head_dims", lambda _, own=ops.head_dims: own(torch.device("cuda")))
    monkeypatch.setattr("filbert.nn.dense.backends.BACKENDS", (FLinear,))
    for module in ("lowrank.linear", "build"):
        monkeypatch.setattr(f"filbert.nn.{module}.on_gpu", lambda _: True)

    def rows(dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return dtype if dtype == torch.float16 else row_dtype(dtype, device)

    for module in ("dense.linear", "build", "encoder"):
        monkeypatch.setattr(f"filbert.nn.{module}.row_dtype", rows)
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
