"""bias_gelu_ against float64 GELU."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from cases import DTYPES, normal
from filbert import bias_gelu_
from filbert.ops.shared import calling
from tolerances import assert_close_to_native, assert_exact

FORMS = ["none", "tanh"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 7), (5, 16), (2, 33), (70, 515)], ids=str)
def test_shapes(backend, dtype, shape, form):
    x, bias = normal(*shape, dtype=dtype) * 3, normal(shape[1], dtype=dtype, seed=1)
    exact = gelu(x.double() + bias.double(), approximate=form)
    native = gelu(x + bias, approximate=form)
    ours = x.clone()
    assert bias_gelu_(ours, bias, form) is ours
    assert_close_to_native(ours, native, exact)


@pytest.mark.every_order
@pytest.mark.parametrize("form", FORMS)
def test_every_magnitude(backend, form):
    """A dense sweep, and digits in the negative tail, where x * (1 + erf) / 2 has none."""
    x = torch.linspace(-13, 13, 40001)[None]
    ours = bias_gelu_(x.clone(), None, form)
    exact = gelu(x.double(), approximate=form)
    assert_close_to_native(ours, gelu(x, approximate=form), exact)
    tail = (x > -5) & (x < -1)
    if form == "none":
        assert ((ours.double() - exact) / exact)[tail].abs().max() < 2e-6


def test_special_values(backend):
    x = torch.tensor([[float("inf"), float("nan"), 0.0, -0.0, 1e30, -1e30, 1e-30, -40.0]])
    ours = bias_gelu_(x.clone())[0]
    assert ours[0] == float("inf")
    assert ours[1].isnan()
    assert (ours[2:4] == 0).all()
    assert ours[4] == 1e30
    assert ours[5] == 0
    assert ours[6] == 5e-31
    assert ours[7] == 0


def test_writes_nothing_else(backend):
    buffer = torch.full((5, 13), 99.0)
    bias_gelu_(buffer[1:-1], None)
    assert (buffer[0] == 99).all()
    assert (buffer[-1] == 99).all()


def test_threads_do_not_change_bits(threads):
    x = normal(300, 700)
    expected = torch.cat([bias_gelu_(x[i : i + 1].clone()) for i in range(0, 300, 29)])
    assert_exact(bias_gelu_(x)[::29], expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(4, 2).t(),), "contiguous"),
        ((torch.zeros(2, 4), torch.zeros(3)), "bias"),
        ((torch.zeros(2, 4), torch.zeros(4, device="meta")), "got meta"),
        ((torch.zeros(2, 4), None, "sigmoid"), "approximate; got sigmoid"),
        ((torch.zeros(2, 4, dtype=torch.int32),), "dtype of x"),
    ],
)
def test_refuses(args, message):
    with pytest.raises(RuntimeError, match=message):
        bias_gelu_(*args)


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    args = (normal(3, 9, dtype=dtype), normal(9, dtype=dtype), "tanh")
    torch.library.opcheck(calling.kernels().bias_gelu_.default, args)
