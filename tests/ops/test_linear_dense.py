"""linear_dense against float64, and its promise that a row's bits depend on the row alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cases import normal
from filbert import explain, linear_dense, pack_dense, unpack_dense
from filbert.ops._linear_dense import reference_linear_dense
from filbert.ops.shared import calling
from machine_code import needs_machine_code, stack_moves
from tolerances import assert_close_to_native, assert_exact

#: dtype of the rows, dtype of the weight
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]
pairs = pytest.mark.parametrize(("rows", "weights"), PAIRS, ids=str)
ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
}


def weight_of(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return (normal(outputs, inputs, seed=1) * max(inputs, 1) ** -0.5).to(dtype)


@pairs
@pytest.mark.parametrize(
    ("count", "inputs", "outputs"),
    [
        (1, 1, 1), (2, 3, 5), (1, 768, 200), (5, 256, 16), (7, 257, 33), (13, 511, 47),
        (30, 64, 64), (97, 513, 80), (130, 1024, 31), (0, 8, 8), (3, 0, 17), (4, 8, 0),
    ],
)  # fmt: skip
def test_shapes(isa, rows, weights, count, inputs, outputs):
    x, w = normal(count, inputs, dtype=rows), weight_of(outputs, inputs, weights)
    bias = normal(outputs, dtype=rows, seed=2)
    ours = linear_dense(x, pack_dense(w), outputs, bias)
    exact = x.double() @ w.double().T + bias.double()
    native = F.linear(x, w.to(rows), bias)
    assert ours.dtype == rows
    # Of few outputs native's largest error may be small by chance: half of what a chain of so many
    # roundings is expected to lose is allowed besides.
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    room = 0.5 * torch.finfo(torch.float32).eps / 4 * inputs**0.5 * largest
    assert_close_to_native(ours, native, exact, room=room)


@pairs
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_what_follows_the_product(isa, rows, weights, activation, norm):
    x, w = normal(29, 100, dtype=rows), weight_of(70, 100, weights)
    bias, residual = normal(70, dtype=rows, seed=2), normal(29, 70, dtype=rows, seed=3)
    gamma, beta = normal(70, dtype=rows, seed=4), normal(70, dtype=rows, seed=5)
    act = ACTIVATIONS[activation]

    def follow(y: Tensor, dtype: torch.dtype) -> Tensor:
        y = act(y + bias.to(dtype)).to(dtype) + residual.to(dtype)
        return F.layer_norm(y, (70,), gamma.to(dtype), beta.to(dtype), 1e-5) if norm else y

    ours = linear_dense(
        x, pack_dense(w), 70, bias, activation, residual, *((gamma, beta) if norm else ()),
        eps=1e-5,
    )  # fmt: skip
    exact = follow(x.double() @ w.double().T, torch.float64)
    native = follow(F.linear(x, w.to(rows)), rows)
    assert_close_to_native(ours, native, exact)


@pairs
@pytest.mark.parametrize(("inputs", "outputs"), [(600, 200), (1024, 96)])
def test_a_row_has_the_same_bits_in_any_batch(isa, rows, weights, inputs, outputs):
    x, w = normal(150, inputs, dtype=rows), pack_dense(weight_of(outputs, inputs, weights))
    bias, residual = normal(outputs, dtype=rows, seed=2), normal(150, outputs, dtype=rows, seed=3)
    gamma, beta = normal(outputs, dtype=rows, seed=4), normal(outputs, dtype=rows, seed=5)

    def run(at: Tensor | slice) -> Tensor:
        return linear_dense(x[at], w, outputs, bias, "gelu", residual[at], gamma, beta, 1e-5)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([run(slice(i, i + 1)) for i in range(150)])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in [*range(1, 27), 49, 64, 100, 150]:
                assert_exact(run(slice(150 - count, 150)), alone[150 - count :])
            shuffled = torch.randperm(150, generator=torch.Generator().manual_seed(0))
            assert_exact(run(shuffled), alone[shuffled])
    finally:
        torch.set_num_threads(before)


@pairs
def test_one_bad_row_stays_alone(isa, rows, weights):
    x, w = normal(20, 300, dtype=rows), pack_dense(weight_of(40, 300, weights))
    clean = linear_dense(x, w, 40)
    x[3, 7], x[11] = torch.nan, torch.inf
    ours = linear_dense(x, w, 40)
    assert ours[3].isnan().all()
    assert not ours[11].isfinite().any()
    others = [i for i in range(20) if i not in (3, 11)]
    assert_exact(ours[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_weight_is_widened_exactly(isa, dtype):
    """One input of 1, so that an output is its weight."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    one = torch.ones(1, 1)
    ours = linear_dense(one, pack_dense(every), 1 << 16)[0]
    assert_exact(ours, every[:, 0].float())
    several = linear_dense(one.expand(5, 1).contiguous(), pack_dense(every), 1 << 16)
    assert_exact(several, every[:, 0].float().expand(5, -1))


def test_rows_with_a_stride(isa):
    wide = normal(33, 900)
    w = pack_dense(weight_of(50, 300, torch.float32))
    assert_exact(
        linear_dense(wide[:, 300:600], w, 50), linear_dense(wide[:, 300:600].clone(), w, 50)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (16, 2), (33, 7), (48, 64), (0, 5), (5, 0)], ids=str)
def test_packing_is_exact_and_reversible(dtype, shape):
    bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=torch.Generator().manual_seed(0))
    weight = bits.to(torch.int16).view(dtype) if dtype.itemsize == 2 else normal(*shape)
    packed = pack_dense(weight)
    back = unpack_dense(packed, *shape)
    assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))
    assert packed.is_contiguous()
    with pytest.raises(ValueError, match=r"packed: got .* need .* try pack_dense"):
        unpack_dense(packed, shape[0] + 16, shape[1])


def test_reference_is_the_same():
    x, w = normal(9, 50), weight_of(20, 50, torch.float16)
    others = (normal(20), "silu", normal(9, 20), normal(20), normal(20), 1e-5)
    assert torch.allclose(
        linear_dense(x, pack_dense(w), 20, *others),
        reference_linear_dense(x, pack_dense(w), 20, *others), atol=1e-5,
    )  # fmt: skip


X, W = torch.zeros(2, 4), torch.zeros(1, 4, 16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, torch.zeros(3, 4), 3), r"weight; got \[3, 4\]; need a contiguous \[1, 4, 16\]"),
        ((X, W, 17), r"need a contiguous \[2, 4, 16\] for 17 outputs of 4 inputs; try pack_dense"),
        ((X, W.bfloat16(), 3), r"need a contiguous \[1, 2, 16, 2\]"),
        ((X, W.double(), 3), "dtype of weight; got Double"),
        ((X.bfloat16(), W, 3), "dtype of weight; got Float; need bfloat16 for bfloat16 rows"),
        ((X.half(), W, 3), "dtype of x"),
        ((X.t(), W, 3), "x; got"),
        ((X, W, 3, torch.zeros(4)), "bias"),
        ((X, W, 3, None, "tanh"), "activation; got tanh"),
        ((X, W, 3, None, "none", torch.zeros(2, 4)), "residual"),
        ((X, W, 3, None, "none", torch.zeros(3, 3)), "rows of residual"),
        ((X, W, 3, None, "none", None, torch.ones(3)), "norm_weight alone; need both"),
        ((X, W, -1), "outputs; got -1"),
    ],
)
def test_refuses(args, message):
    with pytest.raises(RuntimeError, match=message):
        linear_dense(*args)


@pairs
def test_opcheck(rows, weights):
    args = (normal(3, 9, dtype=rows), pack_dense(weight_of(20, 9, weights)), 20)
    torch.library.opcheck(calling.kernels().linear_dense.default, args)


def test_explains():
    text = str(explain("linear_dense", normal(4, 8), pack_dense(normal(8, 8)), 8))
    assert "512 floating-point operations" in text


@needs_machine_code
def test_sums_stay_in_registers():
    """In no tile is a vector moved to or from the stack: whole tiles spill or they do not."""
    moves = stack_moves(r"fixed_tile<[^\n]*(?:Single|Pair)")
    assert {isa for isa, _ in moves} >= {"avx2", "avx512"}
    assert not {name: moved[:3] for name, moved in moves.items() if moved}
