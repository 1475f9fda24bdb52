"""ffn_lowrank against float64, and to the bit against the four calls of linear_dense that it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cases import normal
from filbert import explain, ffn_lowrank, linear_dense, pack_dense
from filbert.ops._ffn_lowrank import reference_ffn_lowrank
from tolerances import assert_close_to_native, assert_exact

#: dtype of the rows, dtype of the factors
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]
pairs = pytest.mark.parametrize(("rows", "weights"), PAIRS, ids=str)
#: rank, inner width, the other rank: one below, at and above every panel and block of steps
RANKS = [
    (1, 1, 1), (15, 100, 16), (16, 128, 17), (17, 129, 15), (257, 300, 31), (31, 513, 257),
    (496, 40, 512),
]  # fmt: skip


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Factors:
    """The four factors of a feed-forward part, with both biases."""

    def __init__(
        self, rank: int, inner: int, other: int, inputs: int, outputs: int,
        rows: torch.dtype, weights: torch.dtype,
    ) -> None:  # fmt: skip
        self.sizes = (rank, inner, other, outputs)
        shapes = ((rank, inputs), (inner, rank), (other, inner), (outputs, other))
        self.factors = [
            (normal(*shape, seed=i) * shape[1] ** -0.5).to(weights)
            for i, shape in enumerate(shapes)
        ]
        self.up_bias = normal(inner, seed=5, dtype=rows)
        self.down_bias = normal(outputs, seed=6, dtype=rows)

    def packed(self) -> tuple[Any, ...]:
        a, b, c, d = map(pack_dense, self.factors)
        return (a, b, self.up_bias, c, d, self.down_bias, *self.sizes)

    def four_calls(self, x: Tensor, activation: str = "gelu", **follows: Any) -> Tensor:
        a, b, c, d = map(pack_dense, self.factors)
        rank, inner, other, outputs = self.sizes
        wide = linear_dense(linear_dense(x, a, rank), b, inner, self.up_bias, activation)
        return linear_dense(linear_dense(wide, c, other), d, outputs, self.down_bias, **follows)

    def in_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        a, b, c, d = (f.to(dtype) for f in self.factors)
        wide = F.gelu(F.linear(F.linear(x.to(dtype), a), b, self.up_bias.to(dtype)))
        return F.linear(F.linear(wide, c), d, self.down_bias.to(dtype))


def operands(count: int, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "residual": normal(count, outputs, seed=7, dtype=dtype),
        "norm_weight": normal(outputs, seed=8, dtype=dtype),
        "norm_bias": normal(outputs, seed=9, dtype=dtype),
        "eps": 1e-5,
    }


@pairs
@pytest.mark.parametrize("sizes", RANKS, ids=str)
@pytest.mark.parametrize("count", [1, 63, 200])
def test_is_four_products(isa, rows, weights, sizes, count):
    """Whatever the ranks and the number of rows: few rows and blocks of them take other ways."""
    given = Factors(*sizes, 70, 33, rows, weights)
    x = normal(count, 70, dtype=rows)
    ours = ffn_lowrank(x, *given.packed())
    assert ours.dtype == rows
    assert_exact(ours, given.four_calls(x))
    follows = operands(count, 33, rows)
    assert_exact(ffn_lowrank(x, *given.packed(), **follows), given.four_calls(x, **follows))


@pairs
@pytest.mark.parametrize("count", [0, 1, 64, 65, 300])
def test_is_close_to_float64(isa, rows, weights, count):
    given = Factors(40, 260, 24, 96, 80, rows, weights)
    x = normal(count, 96, dtype=rows)
    ours = ffn_lowrank(x, *given.packed())
    exact = given.in_dtype(x, torch.float64)
    assert_close_to_native(ours, given.in_dtype(x, rows), exact)
    assert_close_to_native(
        reference_ffn_lowrank(x, *given.packed()), given.in_dtype(x, rows), exact
    )


@pairs
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("count", [1, 30, 200])
def test_factors_that_are_the_identity(isa, rows, weights, threads, count, norm):
    """SHRP's one head into a wide expander: the first weight has as few inputs as a rank."""
    expand = (normal(300, 20) * 20**-0.5).to(weights)
    reduce = (normal(70, 300, seed=1) * 300**-0.5).to(weights)
    up, down = pack_dense(expand), pack_dense(reduce)
    first, last = normal(300, seed=2, dtype=rows), normal(70, seed=3, dtype=rows)
    follows = operands(count, 70, rows)
    if not norm:
        follows = {"residual": follows["residual"]}
    x = normal(count, 560, dtype=rows)[:, 512 : 512 + 20]  # its stride is that of a cache set
    wide = linear_dense(x, up, 300, first, "gelu")
    expected = linear_dense(wide, down, 70, last, **follows)
    ours = ffn_lowrank(x, None, up, first, down, None, last, 20, 300, 70, 70, **follows)
    assert_exact(ours, expected)
    with pytest.raises(RuntimeError, match="up_rank without up_a; got 19; need the inputs of x"):
        ffn_lowrank(x, None, up, first, down, None, last, 19, 300, 70, 70)
    meant = reference_ffn_lowrank(
        x.double(), None, up, first, down, None, last, 20, 300, 70, 70, **follows
    )
    torch.testing.assert_close(ours.double(), meant, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "silu"])
def test_activations(activation):
    given = Factors(20, 150, 30, 64, 48, torch.float32, torch.float32)
    x = normal(150, 64)
    ours = ffn_lowrank(x, *given.packed(), activation)
    assert_exact(ours, given.four_calls(x, activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(isa, threads, dtype):
    given = Factors(33, 200, 20, 64, 48, dtype, dtype)
    x, follows = normal(230, 64, dtype=dtype), operands(230, 48, dtype)
    packed = given.packed()
    expected = None
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        whole = ffn_lowrank(x, *packed, **follows)
        expected = whole if expected is None else expected
        assert_exact(whole, expected)
        for begin, end in ((0, 1), (5, 77), (100, 230), (229, 230)):
            some = follows | {"residual": follows["residual"][begin:end]}
            assert_exact(ffn_lowrank(x[begin:end], *packed, **some), expected[begin:end])


@pairs
@pytest.mark.parametrize(("rank", "other"), [(1, 24), (16, 17), (40, 5)])
@pytest.mark.parametrize("count", [5, 200])
def test_smaller_ranks_are_the_first_of_the_factors(isa, rows, weights, rank, other, count):
    given = Factors(40, 260, 24, 50, 30, rows, weights)
    x = normal(count, 50, dtype=rows)
    a, b, c, d = given.factors
    small = (a[:rank], b[:, :rank], c[:other], d[:, :other])
    pa, pb, pc, pd = map(pack_dense, small)
    sizes = (rank, 260, other, 30)
    cut = (pa, pb, given.up_bias, pc, pd, given.down_bias, *sizes)
    whole = (*given.packed()[:6], *sizes)
    assert_exact(ffn_lowrank(x, *whole), ffn_lowrank(x, *cut))
    wide = x.double()
    assert_exact(reference_ffn_lowrank(wide, *whole), reference_ffn_lowrank(wide, *cut))


def test_rows_with_strides_and_values_that_are_no_numbers():
    given = Factors(18, 140, 20, 40, 24, torch.float32, torch.float32)
    buffer = normal(260, 50)
    x = buffer[::2, 3:43]
    assert_exact(ffn_lowrank(x, *given.packed()), ffn_lowrank(x.contiguous(), *given.packed()))
    x = x.contiguous()
    clean = ffn_lowrank(x, *given.packed())
    x[7, 3], x[80, 39] = torch.nan, torch.inf
    dirty = ffn_lowrank(x, *given.packed())
    assert dirty[[7, 80]].isnan().all()
    kept = [r for r in range(130) if r not in (7, 80)]
    assert_exact(dirty[kept], clean[kept])


def test_factors_of_zeros_give_the_bias():
    given = Factors(16, 130, 16, 32, 24, torch.float32, torch.float32)
    for factor in given.factors:
        factor.zero_()
    ours = ffn_lowrank(normal(100, 32), *given.packed())
    assert_exact(ours, given.down_bias.expand(100, 24))


HIGH_WATER = """
import resource, sys, torch
from filbert import ffn_lowrank, pack_dense
torch.set_num_threads(2)
torch.manual_seed(0)
shapes = ((96, 256), (4096, 96), (96, 4096), (256, 96))
a, b, c, d = (pack_dense(torch.randn(s) * s[1] ** -0.5) for s in shapes)
x = torch.randn(int(sys.argv[1]), 256)
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = ffn_lowrank(x[:2000], a, b, None, c, d, None, 96, 4096, 96, 256)
before = most()
out = ffn_lowrank(x, a, b, None, c, d, None, 96, 4096, 96, 256)
print((most() - before) * 1024 - out.numel() * 4)
"""


def test_memory_does_not_grow_with_the_rows():
    """40,000 rows of 4096 numbers would be 655 MB; beside the result hardly anything is needed."""
    run = subprocess.run(
        [sys.executable, "-c", HIGH_WATER, "40000"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4 << 20


def test_refuses_what_does_not_fit():
    given = Factors(16, 130, 20, 32, 24, torch.float32, torch.float32)
    x, good = normal(5, 32), list(given.packed())
    names = ["up_a", "up_b", "up_bias", "down_a", "down_b", "down_bias", "up_rank", "inner",
             "down_rank", "outputs"]  # fmt: skip
    for name, value, said in (
        ("up_a", good[0].half(), "dtype of up_a"),
        ("down_a", pack_dense(normal(20, 131)), "down_a; got"),
        ("up_rank", 40, "up_a; got"),
        ("up_rank", 0, "up_rank; got 0; need 1 or more"),
        ("inner", 0, "inner; got 0"),
        ("up_bias", normal(129), "up_bias; got"),
    ):
        bad = list(good)
        bad[names.index(name)] = value
        with pytest.raises(RuntimeError, match=rf"ffn_lowrank: {said}"):
            ffn_lowrank(x, *bad)
    with pytest.raises(RuntimeError, match="norm_weight and norm_bias"):
        ffn_lowrank(x, *good, norm_weight=normal(24))
    with pytest.raises(RuntimeError, match="rows of residual"):
        ffn_lowrank(x, *good, residual=normal(6, 24))


def test_explains_itself():
    given = Factors(16, 130, 20, 32, 24, torch.float32, torch.float32)
    facts = explain("ffn_lowrank", normal(5, 32), *given.packed())
    assert "dense 72,800" in str(facts)


def test_opcheck():
    given = Factors(16, 130, 20, 32, 24, torch.float32, torch.float32)
    torch.library.opcheck(
        torch.ops.filbert.ffn_lowrank.default, (normal(5, 32), *given.packed()),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
