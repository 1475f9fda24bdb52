"""The suite itself: what it leaves out, and that its settings hold in every worker."""

from __future__ import annotations

import os
import warnings

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
    if workers > 1:
        assert int(os.environ["OMP_NUM_THREADS"]) * workers <= max(workers, os.cpu_count() or 1)


def test_each_case_is_kept_once() -> None:
    names = [f"test_a[{case}-hostcuda-{seed}]" for case in range(30) for seed in range(3)]
    kept = conftest._one_of_each(names, r"hostcuda-\w+")
    assert kept == conftest._one_of_each(names[::-1], r"hostcuda-\w+")
    assert len(kept) == 30
    assert {name[-2] for name in kept} == {"0", "1", "2"}  # and all orders are drawn


def test_every_backend_is_tested(request: pytest.FixtureRequest) -> None:
    """What is left out of some cases is in others: no instruction set and no order is lost."""
    seen = {
        str(item.callspec.params["backend"])
        for item in request.session.items
        if "backend" in getattr(getattr(item, "callspec", None), "params", {})
    }
    if len(request.session.items) < 2500:
        pytest.skip("only a part of the tests was asked for")
    assert seen >= set(conftest.BACKENDS)
    assert {f"cpu-{isa}" for isa in _load.C.isas()} <= seen


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
