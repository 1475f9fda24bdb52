"""ffn_lowrank's kernel for GPUs, by the host or by a GPU, and the CPU's beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cases import normal
from filbert import ffn_lowrank, pack_dense, pad_factor
from filbert.ops.shared import calling
from tolerances import assert_close_to_native, assert_exact

dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


class Part:
    """A feed-forward part, its factors packed as the backend wants them."""

    def __init__(
        self, backend: str, dtype: torch.dtype, inputs: int, rank: int, inner: int, other: int,
        outputs: int,
    ) -> None:  # fmt: skip
        self.sizes = (rank, inner, other, outputs)
        shapes = ((rank, inputs), (inner, rank), (other, inner), (outputs, other))
        self.factors = [
            (normal(*shape, seed=i) * shape[1] ** -0.5).to(dtype) for i, shape in enumerate(shapes)
        ]
        self.pack = pack_dense if backend == "cpu" else pad_factor
        self.biases = [normal(n, seed=9, dtype=dtype) for n in (inner, outputs)]

    def run(self, x: Tensor, activation: str = "gelu", **more: Any) -> Tensor:
        a, b, c, d = map(self.pack, self.factors)
        return ffn_lowrank(
            x, a, b, self.biases[0], c, d, self.biases[1], *self.sizes, activation, **more
        )

    def in_dtype(self, x: Tensor, dtype: torch.dtype, act: Any = F.gelu, **more: Any) -> Tensor:
        a, b, c, d = (f.to(dtype) for f in self.factors)
        first, last = (bias.to(dtype) for bias in self.biases)
        wide = act(F.linear(F.linear(x.to(dtype), a), b, first))
        out = F.linear(F.linear(wide, c), d, last)
        if not more:
            return out
        out = out + more["residual"].to(dtype)
        if "norm_weight" not in more:
            return out
        weight, bias = (more[n].to(dtype) for n in ("norm_weight", "norm_bias"))
        return F.layer_norm(out, out.shape[-1:], weight, bias, more["eps"])


#: inputs, rank, inner, other rank, outputs: tails at every tile, and whole ones
SIZES = [
    (8, 1, 8, 1, 8), (72, 15, 104, 16, 40), (64, 16, 64, 17, 64), (136, 128, 200, 31, 72),
    (40, 130, 136, 200, 24), (128, 256, 320, 256, 128),
]  # fmt: skip


@pytest.mark.every_order
@dtypes
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 63, 130])
def test_is_close_to_float64(backend, dtype, sizes, count):
    part = Part(backend, dtype, *sizes)
    x = normal(count, sizes[0], dtype=dtype)
    native, exact = part.in_dtype(x, dtype), part.in_dtype(x, torch.float64)
    assert_close_to_native(part.run(x), native, exact)


@dtypes
@pytest.mark.parametrize("inner", [64, 512, 1032, 2048])
def test_blocks_share_the_inner_width_of_few_rows(backend, dtype, inner):
    """From no split to all eight."""
    part = Part(backend, dtype, 24, 20, inner, 18, 16)
    x = normal(3, 24, dtype=dtype)
    assert_close_to_native(part.run(x), part.in_dtype(x, dtype), part.in_dtype(x, torch.float64))


@dtypes
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "relu", "silu"])
def test_what_follows(backend, dtype, activation, norm):
    part = Part(backend, dtype, 32, 24, 72, 40, 48)
    x = normal(70, 32, dtype=dtype)
    more: dict[str, Any] = {"residual": normal(70, 48, seed=7, dtype=dtype)}
    if norm:
        weight, bias = (normal(48, seed=s, dtype=dtype) for s in (8, 10))
        more |= {"norm_weight": weight, "norm_bias": bias, "eps": 1e-5}
    act = {
        "none": lambda y: y, "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    }[activation]  # fmt: skip
    native, exact = (part.in_dtype(x, d, act, **more) for d in (dtype, torch.float64))
    assert_close_to_native(part.run(x, activation, **more), native, exact)


@dtypes
def test_smaller_ranks_are_the_first_of_the_factors(backend, dtype):
    whole = Part(backend, dtype, 32, 40, 72, 48, 24)
    small = Part(backend, dtype, 32, 40, 72, 48, 24)
    a, b, c, d = small.factors
    small.factors = [a[:19], b[:, :19], c[:33], d[:, :33]]
    small.sizes = whole.sizes = (19, 72, 33, 24)
    x = normal(20, 32, dtype=dtype)
    assert_exact(whole.run(x), small.run(x))


@dtypes
def test_a_bad_row_stays_alone_and_rows_may_have_a_stride(backend, dtype):
    part = Part(backend, dtype, 32, 20, 72, 18, 16)
    buffer = normal(90, 48, dtype=dtype)
    x = buffer[:, 8:40]
    clean = part.run(x.contiguous())
    assert_exact(part.run(x), clean)
    x[7, 3] = torch.nan
    dirty = part.run(x)
    assert dirty[7].isnan().all()
    kept = [r for r in range(90) if r != 7]
    assert_exact(dirty[kept], clean[kept])


@pytest.mark.parametrize("ranks", [(3, 5), (130, 256)], ids=str)
def test_many_rows_come_by_128(hostcuda, monkeypatch, ranks):
    monkeypatch.setattr(calling, "kernels", lambda: hostcuda)
    part = Part("hostcuda", torch.bfloat16, 8, ranks[0], 8, ranks[1], 8)
    x = normal(95 * 128 + 9, 8, dtype=torch.bfloat16)
    native, exact = part.in_dtype(x, torch.bfloat16), part.in_dtype(x, torch.float64)
    assert_close_to_native(part.run(x), native, exact)


def test_refuses_what_does_not_fit(hostcuda, monkeypatch):
    monkeypatch.setattr(calling, "kernels", lambda: hostcuda)
    part = Part("hostcuda", torch.bfloat16, 32, 24, 72, 40, 48)
    x = normal(5, 32, dtype=torch.bfloat16)
    a, b, c, d = map(pad_factor, part.factors)
    good = [a, b, None, c, d, None, 24, 72, 40, 48]
    for place, value, said in (
        (0, a.half(), "dtype of up_a"), (0, a[:16], "up_a; got"), (1, b[:, :16], "up_b; got"),
        (6, 257, "rank; got 257; need 256 at most"), (7, 71, "inner; got 71; need a multiple of 8"),
        (9, 49, "outputs; got 49"), (3, pack_dense(part.factors[2]), "down_a; got"),
    ):  # fmt: skip
        bad = list(good)
        bad[place] = value
        with pytest.raises(RuntimeError, match=rf"ffn_lowrank: {said}"):
            ffn_lowrank(x, *bad)
    with pytest.raises(RuntimeError, match="dtype of x; got float32"):
        ffn_lowrank(x.float(), *good)
    with pytest.raises(RuntimeError, match="rows that begin at multiples of 16 bytes"):
        ffn_lowrank(normal(5, 40, dtype=torch.bfloat16)[:, 3:35], *good)


@pytest.mark.parametrize(("capability", "rank"), [(80, 256), (86, 128)])
def test_smaller_gpus_have_ranks_that_fit_their_shared_memory(
    hostcuda, monkeypatch, capability, rank
):
    monkeypatch.setattr(calling, "kernels", lambda: hostcuda)
    part = Part("hostcuda", torch.bfloat16, 16, rank, 24, 3, 8)
    x = normal(5, 16, dtype=torch.bfloat16)
    try:
        hostcuda.set_capability(capability)
        assert part.run(x).isfinite().all()
        if capability == 86:
            with pytest.raises(RuntimeError, match="need 106496 for these ranks"):
                Part("hostcuda", torch.bfloat16, 16, 129, 24, 3, 8).run(x)
    finally:
        hostcuda.set_capability(90)
