"""Backends: one test body runs over every way filbert can compute here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from filbert import _load

ISAS = list(_load.C.isas()) if _load.C is not None else []


@pytest.fixture(params=[f"cpu-{isa}" for isa in ISAS] or ["missing"])
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device operands go to, with the kernels of one instruction set selected."""
    if request.param == "missing":
        pytest.fail(f"the compiled library is missing: {_load.missing['ops']}")
    before = _load.C.isa()
    _load.C.select_isa(request.param.removeprefix("cpu-"))
    yield torch.device("cpu")
    _load.C.select_isa(before)


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
