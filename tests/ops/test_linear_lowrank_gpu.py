"""linear_lowrank's kernel for GPUs, by the host or by a GPU, and the CPU's beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cases import normal
from filbert import linear_lowrank, pack_dense, pad_factor
from filbert.ops.shared import calling
from tolerances import assert_close_to_native, assert_exact

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
#: inputs, rank, outputs: tails at every tile, and whole ones
SIZES = [
    (8, 1, 8), (72, 15, 40), (64, 16, 64), (136, 128, 72), (40, 130, 200), (128, 256, 136),
]  # fmt: skip


def factors(inputs, rank, outputs, dtype):
    a = (normal(rank, inputs, seed=1) * inputs**-0.5).to(dtype)
    return a, (normal(outputs, rank, seed=2) * rank**-0.5).to(dtype)


def packed(backend, *given):
    return [(pack_dense if backend == "cpu" else pad_factor)(factor) for factor in given]


@pytest.mark.every_order
@dtypes
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 63, 130])
def test_is_close_to_float64(backend, dtype, sizes, count):
    inputs, rank, outputs = sizes
    a, b = factors(*sizes, dtype)
    x, bias = normal(count, inputs, dtype=dtype), normal(outputs, seed=3, dtype=dtype)

    def in_dtype(kind):
        return F.linear(F.linear(x.to(kind), a.to(kind)), b.to(kind), bias.to(kind))

    ours = linear_lowrank(x, *packed(backend, a, b), rank, outputs, bias)
    assert_close_to_native(ours, in_dtype(dtype), in_dtype(torch.float64))


@dtypes
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "silu"])
def test_what_follows(backend, dtype, activation, norm):
    a, b = factors(32, 24, 48, dtype)
    x, bias = normal(70, 32, dtype=dtype), normal(48, seed=3, dtype=dtype)
    more: dict[str, Any] = {"residual": normal(70, 48, seed=7, dtype=dtype)}
    if norm:
        weight, beta = (normal(48, seed=s, dtype=dtype) for s in (8, 10))
        more |= {"norm_weight": weight, "norm_bias": beta, "eps": 1e-5}
    act = {
        "none": lambda y: y, "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    }[activation]  # fmt: skip

    def in_dtype(kind):
        y = act(F.linear(F.linear(x.to(kind), a.to(kind)), b.to(kind), bias.to(kind)))
        y = y + more["residual"].to(kind)
        if not norm:
            return y
        return F.layer_norm(y, (48,), weight.to(kind), beta.to(kind), 1e-5)

    ours = linear_lowrank(x, *packed(backend, a, b), 24, 48, bias, activation, **more)
    assert_close_to_native(ours, in_dtype(dtype), in_dtype(torch.float64))


@dtypes
def test_a_smaller_rank_and_rows_with_a_stride(backend, dtype):
    a, b = factors(32, 40, 48, dtype)
    buffer = normal(70, 48, dtype=dtype)
    x = buffer[:, 8:40]
    whole = linear_lowrank(x, *packed(backend, a, b), 19, 48)
    small = linear_lowrank(x.contiguous(), *packed(backend, a[:19], b[:, :19]), 19, 48)
    assert_exact(whole, small)


@pytest.mark.parametrize("rank", [5, 256])
def test_many_rows_come_by_128(hostcuda, monkeypatch, rank):
    monkeypatch.setattr(calling, "kernels", lambda: hostcuda)
    a, b = factors(8, rank, 8, torch.bfloat16)
    x = normal(95 * 128 + 9, 8, dtype=torch.bfloat16)

    def in_dtype(kind):
        return F.linear(F.linear(x.to(kind), a.to(kind)), b.to(kind))

    ours = linear_lowrank(x, pad_factor(a), pad_factor(b), rank, 8)
    assert_close_to_native(ours, in_dtype(torch.bfloat16), in_dtype(torch.float64))


def test_refuses_what_does_not_fit(hostcuda, monkeypatch):
    monkeypatch.setattr(calling, "kernels", lambda: hostcuda)
    a, b = factors(32, 24, 48, torch.bfloat16)
    x, good = normal(5, 32, dtype=torch.bfloat16), [pad_factor(a), pad_factor(b), 24, 48]
    for place, value, said in (
        (1, pad_factor(b.half()), "dtype of b"), (0, pad_factor(a)[:16], "a; got"),
        (1, pad_factor(b)[:, :16].contiguous(), "b; got"), (2, 257, "rank; got 257"),
        (3, 49, "outputs; got 49; need a multiple of 8"), (0, pack_dense(a), "a; got"),
    ):  # fmt: skip
        bad = list(good)
        bad[place] = value
        with pytest.raises(RuntimeError, match=rf"linear_lowrank: {said}"):
            linear_lowrank(x, *bad)
    with pytest.raises(RuntimeError, match="dtype of x; got float32"):
        linear_lowrank(x.float(), *(f.float() for f in good[:2]), 24, 48)
