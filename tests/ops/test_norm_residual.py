"""norm_residual against float64 LayerNorm."""

from __future__ import annotations

import pytest
import torch

from cases import DTYPES, normal
from filbert import norm_residual, norm_residual_
from filbert.ops import norm_residual_codes
from filbert.ops._norm_residual import reference_norm_residual
from filbert.ops.shared import calling
from tolerances import assert_close_to_native, assert_codes, assert_exact

SHAPES = [(0, 8), (1, 1), (3, 7), (5, 16), (2, 33), (9, 384), (130, 768), (4, 1031)]


def operands(rows: int, width: int, dtype: torch.dtype, bias: bool = True, residual: bool = True):
    x, r = normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    b, weight, beta = normal(3, width, dtype=dtype, seed=2)
    return x, b if bias else None, r if residual else None, weight, beta


def unfused(x, bias, residual, weight, beta, eps):
    """What a model does without the fused kernel, in its own dtype."""
    for term in (bias, residual):
        x = x if term is None else x + term
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, beta, eps)


def check(args, eps=1e-12):
    exact = reference_norm_residual(*(None if t is None else t.double() for t in args), eps)
    ours = norm_residual(*args, eps)
    assert ours.dtype == args[0].dtype
    assert_close_to_native(ours, unfused(*args, eps), exact)
    return ours


@pytest.mark.every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, dtype, shape):
    check(operands(*shape, dtype), eps=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("residual", [False, True], ids=["noresidual", "residual"])
def test_absent_operands(backend, bias, residual):
    check(operands(6, 100, torch.float32, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_of_the_result(backend, dtype, shape):
    args = operands(*shape, dtype)
    ours, *codes = norm_residual_codes(*args, 1e-5)
    assert_exact(ours, norm_residual(*args, 1e-5))
    assert_codes(codes, reference_norm_residual(args[0].float(), *args[1:], 1e-5))


def test_codes_of_a_bad_row(backend):
    for width in (40, 100, 1500):
        args = operands(9, width, torch.float32)
        args[0][4, width - 1] = torch.nan
        _, _, scale, _ = norm_residual_codes(*args, 1e-5)
        assert scale.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_writes_its_rows_only(backend, dtype):
    rows, width = 7, 45
    x, *rest = operands(rows, width, dtype)
    buffer = torch.full((rows + 2, width + 3), 1234.0, dtype=dtype)
    view = buffer[1:-1, :width]
    view.copy_(x)
    expected = norm_residual(x, *rest, 1e-12)
    assert norm_residual_(view, *rest, 1e-12) is view
    assert_exact(view, expected)
    assert (buffer[0] == 1234).all()
    assert (buffer[-1] == 1234).all()
    assert (buffer[:, width:] == 1234).all()


def test_large_mean_small_variance(backend):
    """One-pass variance cancels here; two passes keep the digits that the input has."""
    x, b, r, w, beta = operands(4, 512, torch.float32)
    args = (x * 1e-2 + 1000.0, None, None, w, beta)
    check(args, eps=1e-12)
    assert torch.isfinite(norm_residual(x, b, r, w, beta, 0.0)).all()


def test_eps_is_used(backend):
    x = torch.zeros(2, 24)
    weight, beta = torch.ones(24), normal(24)
    assert_exact(norm_residual(x, None, None, weight, beta, 1e-12), beta.expand(2, 24))
    x[:, ::2] = 1e-3
    loose = norm_residual(x, None, None, weight, torch.zeros(24), 1.0)
    assert loose.abs().max() < 1e-3


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_near_the_limit(backend, value):
    x, b, _, w, beta = operands(2, 40, torch.float32)
    x[0, 3] = value  # its square is no float32: the variance is inf, and the row is its beta
    ours = norm_residual(x, b, None, w, beta, 1e-5)
    assert_exact(ours[0], beta)
    assert_exact(ours[1:], norm_residual(x[1:], b, None, w, beta, 1e-5))


def test_a_nan_row_stays_alone(backend):
    x, b, r, w, beta = operands(5, 70, torch.float32)
    expected = norm_residual(x, b, r, w, beta, 1e-12)
    x[2, 5] = float("nan")
    ours = norm_residual(x, b, r, w, beta, 1e-12)
    assert ours[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert_exact(ours[keep], expected[keep])


def test_strided_rows(backend):
    x, b, r, w, beta = operands(6, 32, torch.float32)
    wide_x, wide_r = torch.zeros(6, 50), torch.zeros(6, 40)
    wide_x[:, :32], wide_r[:, :32] = x, r
    ours = norm_residual(wide_x[:, :32], b, wide_r[:, :32], w, beta, 1e-12)
    assert_exact(ours, norm_residual(x, b, r, w, beta, 1e-12))


def test_threads_do_not_change_bits(threads):
    args = operands(600, 768, torch.float32)
    x, bias, residual, weight, beta = args
    alone = [
        norm_residual(x[i : i + 1], bias, residual[i : i + 1], weight, beta, 1e-12)
        for i in range(0, 600, 37)
    ]
    assert_exact(norm_residual(*args, 1e-12)[::37], torch.cat(alone))


X, ONE = torch.zeros(2, 4), torch.zeros(4)
REFUSALS = {
    "rank": ((ONE, None, None, ONE, ONE), r"need \[T, N\]"),
    "dtype": ((X.half(), None, None, ONE, ONE), "dtype of x"),
    "weight": ((X, None, None, torch.zeros(5), ONE), "weight"),
    "mixed": ((X, None, None, ONE.bfloat16(), ONE), "weight"),
    "residual": ((X, None, torch.zeros(3, 4), ONE, ONE), "residual"),
    "meta": ((X, None, None, ONE.to("meta"), ONE), "got meta"),
    "columns": ((torch.zeros(4, 2).t(), None, None, ONE, ONE), "contiguous rows"),
}


@pytest.mark.parametrize(("args", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(args, message):
    with pytest.raises(RuntimeError, match=message):
        norm_residual(*args, 1e-5)


def test_in_place_refuses_overlapping_rows():
    with pytest.raises(RuntimeError, match="do not overlap"):
        norm_residual_(torch.zeros(1, 4).expand(3, 4), None, None, ONE, ONE, 1e-5)


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    args = operands(3, 24, dtype)
    torch.library.opcheck(calling.kernels().norm_residual.default, (*args, 1e-5))
    torch.library.opcheck(calling.kernels().norm_residual_.default, (*args, 1e-5))
