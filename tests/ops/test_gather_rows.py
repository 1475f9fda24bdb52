"""gather_rows against indexing."""

from __future__ import annotations

import pytest
import torch

from cases import DTYPES, normal
from filbert import gather_rows
from filbert.ops.shared import calling
from tolerances import assert_exact

KINDS = [*DTYPES, torch.int64, torch.uint8]


def rows_of(dtype, *shape):
    return (normal(*shape) * 50).to(dtype)


@pytest.mark.every_order
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("width", [1, 3, 8, 40, 768])
def test_gathers(backend, dtype, width):
    x = rows_of(dtype, 20, width)
    index = torch.tensor([3, -1, 19, 3, 0, 20, 7])
    expected = x[index.clamp(0, 19)]
    expected[[1, 5]] = 0  # -1 and 20 are no rows
    assert_exact(gather_rows(x, index), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_and_odd_places(backend, dtype):
    """Only the bytes that are asked for are read, wherever they begin."""
    buffer = rows_of(dtype, 30, 50)
    index = torch.arange(29, -1, -1)
    for columns in (slice(0, 32), slice(1, 33), slice(5, 6), slice(8, 24)):
        x = buffer[:, columns]
        assert_exact(gather_rows(x, index), x.flip(0))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_nothing_to_gather(backend, shape):
    x = torch.zeros(shape)
    assert gather_rows(x, torch.zeros(0, dtype=torch.int64)).shape == (0, shape[1])
    assert_exact(gather_rows(x, torch.tensor([-1, 0])), torch.zeros(2, shape[1]))


def test_packing_and_unpacking_are_inverse(backend):
    keep = torch.tensor([True, False, True, True, False, True])
    x = normal(6, 16)
    places = keep.nonzero().squeeze(1)
    back = torch.where(keep, keep.cumsum(0) - 1, -1)
    packed = gather_rows(x, places)
    assert_exact(packed, x[places])
    assert_exact(gather_rows(packed, back), x * keep[:, None])


def test_threads_do_not_change_bits(threads):
    x, index = normal(500, 700), torch.arange(499, -1, -1)
    assert_exact(gather_rows(x, index), x.flip(0))


X, INDEX = torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
REFUSALS = {
    "rank": ((X[0], INDEX), r"need \[R, N\]"),
    "columns": ((torch.zeros(4, 3).t(), INDEX), "contiguous rows"),
    "index_rank": ((X, INDEX[None]), r"need a contiguous \[T\]"),
    "index_dtype": ((X, INDEX.int()), "int64"),
    "device": ((X, INDEX.to("meta")), "got meta"),
}


@pytest.mark.parametrize(("args", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(args, message):
    with pytest.raises(RuntimeError, match=message):
        gather_rows(*args)


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_opcheck(backend, dtype):
    args = (rows_of(dtype, 5, 6), torch.tensor([4, -1, 0]))
    torch.library.opcheck(calling.kernels().gather_rows.default, args)
