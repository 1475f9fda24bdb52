"""linear_lowrank against float64, and to the bit against the two calls of linear_dense it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import normal
from filbert import explain, linear_dense, linear_lowrank, pack_dense
from filbert.ops._linear_lowrank import reference_linear_lowrank
from tolerances import assert_close_to_native, assert_exact

PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]
pairs = pytest.mark.parametrize(("rows", "weights"), PAIRS, ids=str)


def factors(inputs, rank, outputs, weights):
    a = (normal(rank, inputs, seed=1) * inputs**-0.5).to(weights)
    return a, (normal(outputs, rank, seed=2) * rank**-0.5).to(weights)


def follows(count, outputs, dtype):
    return {
        "bias": normal(outputs, seed=3, dtype=dtype), "activation": "gelu",
        "residual": normal(count, outputs, seed=4, dtype=dtype),
        "norm_weight": normal(outputs, seed=5, dtype=dtype),
        "norm_bias": normal(outputs, seed=6, dtype=dtype), "eps": 1e-5,
    }  # fmt: skip


@pairs
@pytest.mark.parametrize(
    ("inputs", "rank", "outputs"),
    [(70, 1, 33), (96, 15, 16), (33, 16, 80), (512, 17, 64), (48, 257, 300), (64, 64, 64)],
)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_is_two_products(isa, rows, weights, inputs, rank, outputs, count):
    a, b = factors(inputs, rank, outputs, weights)
    x, packed = normal(count, inputs, dtype=rows), (pack_dense(a), pack_dense(b))
    narrow = linear_dense(x, packed[0], rank)
    assert_exact(
        linear_lowrank(x, *packed, rank, outputs), linear_dense(narrow, packed[1], outputs)
    )
    more = follows(count, outputs, rows)
    assert_exact(
        linear_lowrank(x, *packed, rank, outputs, **more),
        linear_dense(narrow, packed[1], outputs, **more),
    )


@pairs
def test_is_close_to_float64(isa, rows, weights):
    a, b = factors(90, 40, 70, weights)
    x, bias = normal(130, 90, dtype=rows), normal(70, seed=3, dtype=rows)

    def in_dtype(dtype):
        return F.linear(F.linear(x.to(dtype), a.to(dtype)), b.to(dtype), bias.to(dtype))

    packed = (pack_dense(a), pack_dense(b), 40, 70, bias)
    exact, native = in_dtype(torch.float64), in_dtype(rows)
    assert_close_to_native(linear_lowrank(x, *packed), native, exact)
    assert_close_to_native(reference_linear_lowrank(x, *packed), native, exact)


def test_a_row_has_the_same_bits_in_any_batch(isa):
    a, b = map(pack_dense, factors(64, 33, 48, torch.float32))
    buffer = normal(230, 70)
    x, more = buffer[:, 3:67], follows(230, 48, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole = linear_lowrank(x, a, b, 33, 48, **more)
            for begin, end in ((0, 1), (5, 77), (100, 230)):
                some = more | {"residual": more["residual"][begin:end]}
                assert_exact(linear_lowrank(x[begin:end], a, b, 33, 48, **some), whole[begin:end])
    finally:
        torch.set_num_threads(before)


@pairs
@pytest.mark.parametrize("rank", [1, 16, 17, 30, 33])
@pytest.mark.parametrize("count", [5, 200])
def test_a_smaller_rank_is_the_first_of_the_factors(isa, rows, weights, rank, count):
    a, b = factors(70, 33, 40, weights)
    x = normal(count, 70, dtype=rows)
    cut = pack_dense(a[:rank]), pack_dense(b[:, :rank])
    whole = pack_dense(a), pack_dense(b)
    expected = linear_lowrank(x, *cut, rank, 40)
    assert_exact(linear_lowrank(x, *whole, rank, 40), expected)
    meant = reference_linear_lowrank(x.double(), *whole, rank, 40)
    assert_exact(meant, reference_linear_lowrank(x.double(), *cut, rank, 40))


def test_a_row_that_is_no_number_stays_alone():
    a, b = map(pack_dense, factors(64, 16, 48, torch.float32))
    x = normal(130, 64)
    clean = linear_lowrank(x, a, b, 16, 48)
    x[7, 3] = torch.nan
    dirty = linear_lowrank(x, a, b, 16, 48)
    assert dirty[7].isnan().all()
    kept = [r for r in range(130) if r != 7]
    assert_exact(dirty[kept], clean[kept])


def test_refuses_what_does_not_fit():
    a, b = factors(32, 16, 24, torch.float32)
    x, good = normal(5, 32), [pack_dense(a), pack_dense(b), 16, 24]
    for place, value, said in (
        (0, pack_dense(normal(16, 31)), "a; got"), (1, pack_dense(b.half()), "dtype of b"),
        (2, 0, "rank; got 0"), (2, 40, "a; got"), (3, 0, "outputs; got 0"), (3, 60, "b; got"),
    ):  # fmt: skip
        bad = list(good)
        bad[place] = value
        with pytest.raises(RuntimeError, match=rf"linear_lowrank: {said}"):
            linear_lowrank(x, *bad)
    with pytest.raises(RuntimeError, match="rows of residual"):
        linear_lowrank(x, *good, residual=normal(6, 24))


def test_explains_itself():
    a, b = map(pack_dense, factors(32, 16, 24, torch.float32))
    whole, half = normal(5, 32), [pack_dense(f) for f in factors(32, 4, 24, torch.float32)]
    assert "3.43x fewer operations: runs as" in str(explain("linear_lowrank", whole, *half, 4, 24))
    assert "the product of the factors is as fast" in str(
        explain("linear_lowrank", whole, a, b, 16, 24)
    )
    assert "dense 7,680" in str(explain("linear_lowrank", normal(5, 32), a, b, 16, 24))


def test_opcheck():
    a, b = map(pack_dense, factors(32, 16, 24, torch.float32))
    torch.library.opcheck(
        torch.ops.filbert.linear_lowrank.default, (normal(5, 32), a, b, 16, 24),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
