"""quantize_rows: the reference's codes, on every instruction set and on CUDA."""

from __future__ import annotations

import pytest
import torch

from cases import normal
from filbert import explain, quantize_rows
from filbert.ops._quantize_rows import reference_quantize_rows
from filbert.ops.shared import calling
from tolerances import assert_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        assert_exact(one.cpu(), other.cpu())


@pytest.mark.every_order
@dtypes
@pytest.mark.parametrize(
    ("rows", "width"),
    [(0, 5), (1, 1), (3, 7), (5, 16), (2, 31), (9, 64), (4, 130), (3, 768), (2, 3073), (4, 0)],
)
def test_equals_the_reference(backend, dtype, rows, width):
    x = normal(rows, width, dtype=dtype)
    ours = quantize_rows(x)
    assert_same(ours, reference_quantize_rows(x))
    if width:
        codes, scale, zero = ours
        back = scale[:, None] * (codes.float() - zero[:, None])
        # Half a step of the code, and half a step of the zero at the ends of the range.
        assert bool(((back - x.float()).abs() <= 1.001 * scale[:, None]).all())


@dtypes
def test_ranges(backend, dtype):
    """Rows of one sign, of zeros, of nearly nothing, and as large as there is."""
    x = normal(9, 50, dtype=dtype)
    x[0] = x[0].abs() + 1
    x[1] = -x[1].abs() - 1
    x[2] = 0
    x[3] = 0
    x[3, 4] = torch.finfo(dtype).tiny / 4
    x[4] *= torch.finfo(dtype).max / 5
    x[5, ::2], x[5, 1::2] = torch.finfo(dtype).max, torch.finfo(dtype).min
    x[6] = torch.finfo(dtype).max
    x[7] = torch.tensor([-0.17, 8.0], dtype=dtype).repeat(25)
    ours = quantize_rows(x)
    assert_same(ours, reference_quantize_rows(x))
    assert ours[2][0] == 0
    assert ours[2][1] == 255
    assert ours[1][2] == 0
    assert bool(ours[1].isfinite().all())


@dtypes
def test_halves_are_rounded_to_even(backend, dtype):
    x = torch.arange(-128, 128, 0.5).to(dtype)[None, 1:]
    x[0, -1] = 127
    assert_same(quantize_rows(x), reference_quantize_rows(x))
    one, none = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    codes, _, _ = quantize_rows(x, one, none + 128)
    assert_exact(codes[0], (x[0].float().round() + 128).clamp(0, 255).to(torch.uint8))


@dtypes
def test_static_scale(backend, dtype):
    x = normal(6, 70, dtype=dtype) * 3
    x[2, 5], x[3, 1] = torch.nan, -torch.inf
    scale, zero = torch.tensor([0.01]), torch.tensor([100], dtype=torch.int32)
    ours = quantize_rows(x, scale, zero)
    assert_same(ours, reference_quantize_rows(x, scale, zero))
    assert ours[1].isnan().tolist() == [False, False, True, True, False, False]


@dtypes
def test_a_bad_row_stays_alone(backend, dtype):
    x = normal(7, 65, dtype=dtype)
    clean = quantize_rows(x)
    x[1, 64], x[3, 0], x[5] = torch.inf, torch.nan, -torch.inf
    ours = quantize_rows(x)
    assert ours[1].isnan().tolist() == [False, True, False, True, False, True, False]
    assert_same([t[::2] for t in ours], [t[::2] for t in clean])


@dtypes
def test_rows_with_a_stride(backend, dtype):
    x = normal(8, 100, dtype=dtype)
    assert_same(quantize_rows(x[1::2, 3:52]), quantize_rows(x[1::2, 3:52].contiguous()))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3),), r"x; got \[3\]; need \[T, K\]"),
        ((torch.zeros(3, 4).t(),), "contiguous rows"),
        ((torch.zeros(3, 4).double(),), "dtype of x; got Double"),
        ((torch.zeros(3, 4), ONE), "scale alone; need both or neither"),
        ((torch.zeros(3, 4), ONE, ONE), "dtype of zero; got Float; need Int"),
        ((torch.zeros(3, 4), torch.ones(3), torch.zeros(1, dtype=torch.int32)), "scale; got"),
    ],
)
def test_refuses(args, message):
    with pytest.raises(RuntimeError, match=message):
        quantize_rows(*args)


def test_opcheck(backend):
    torch.library.opcheck(calling.kernels().quantize_rows.default, (normal(3, 9),))


def test_explains():
    assert "172 bytes" in str(explain("quantize_rows", normal(4, 7)))
