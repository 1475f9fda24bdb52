"""The suite itself: what it leaves out, and that its settings hold in every worker."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict

import pytest
import torch

import conftest
from filbert import _load
from once import once


def test_a_warning_fails_a_test() -> None:
    """Also in a process of pytest-xdist."""
    with pytest.raises(RuntimeWarning):
        warnings.warn("a value is wrong", RuntimeWarning, stacklevel=1)


def test_workers_share_the_processors() -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if conftest.OMP_ASKED is not None:
        assert os.environ["OMP_NUM_THREADS"] == conftest.OMP_ASKED
    elif workers > 1:
        assert int(os.environ["OMP_NUM_THREADS"]) * workers <= max(workers, os.cpu_count() or 1)


def test_each_case_is_kept_once() -> None:
    names = [f"test_a[{case}-hostcuda-{seed}]" for case in range(30) for seed in range(3)]
    kept = conftest._one_of_each(names, r"hostcuda-\w+")
    assert kept == conftest._one_of_each(names[::-1], r"hostcuda-\w+")
    assert len(kept) == 30
    assert {name[-2] for name in kept} == {"0", "1", "2"}  # and all orders are drawn


#: file -> the backends that it needs, where that is not all of them
NEEDED = {
    "test_attn_tiles": {b for b in conftest.BACKENDS if not b.startswith("cpu-")},  # CUDA's own
    # whole models, of which one order takes long enough
    "test_capture": {b for b in conftest.BACKENDS if b in ("hostcuda-0", "cuda")},
    "test_cuda_model": {b for b in conftest.BACKENDS if b in ("hostcuda-0", "cuda")},
}


def test_every_backend_is_tested(request: pytest.FixtureRequest) -> None:
    """What is left out of some cases is in others of the same file: no instruction set, no order
    and no side of a guard page is lost."""
    asked = request.config
    parts = [
        name for name in ("keyword", "markexpr", "deselect", "lf") if asked.getoption(name, None)
    ]
    if parts or any("::" in name for name in asked.args):
        pytest.skip("only parts of files were asked for")
    everywhere = set(conftest.BACKENDS)
    seen: dict[str, set[str]] = defaultdict(set)
    for item in request.session.items:
        backend = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        if backend in everywhere:
            seen[item.path.stem].add(str(backend))
    assert everywhere >= {f"cpu-{isa}" for isa in _load.C.isas()}
    missing = {stem: NEEDED.get(stem, everywhere) - ran for stem, ran in seen.items()}
    assert not {stem: backends for stem, backends in missing.items() if backends}


def test_an_answer_is_computed_once_for_equal_content() -> None:
    calls = []

    @once
    def double(x: torch.Tensor, *, times: int) -> torch.Tensor:
        calls.append(times)
        return x * times

    one, same = torch.ones(3), torch.ones(6)[::2]
    assert double(one, times=2) is double(same, times=2)
    double(one, times=3), double(torch.ones(1, 3), times=2), double(one.double(), times=2)
    one[0] = 5
    assert double(one, times=2)[0] == 10
    assert calls == [2, 3, 2, 2, 2]
