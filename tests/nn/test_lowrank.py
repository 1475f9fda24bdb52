"""The modules of low rank: what they compute, and that they come back from a file as they were."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cases import normal
from filbert.nn import Factors, FeedForwardLowRank, LinearLowRank, LowRankAttention, RowNorm
from filbert.nn.dense.attention import DenseAttention
from filbert.nn.kinds import (
    attention_from_config,
    feed_forward_from_config,
    linear_from_config,
)
from filbert.packed.batch import PackedBatch
from tolerances import assert_close_to_native, assert_exact

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORM = RowNorm(normal(48, seed=8), normal(48, seed=9), 1e-5)


def factors(outputs: int, inputs: int, rank: int, dtype: torch.dtype = torch.float32) -> Factors:
    a, b = normal(rank, inputs) * inputs**-0.5, normal(outputs, rank, seed=1) * rank**-0.5
    return Factors(a.to(dtype), b.to(dtype))


def norm_of(dtype: torch.dtype) -> RowNorm:
    assert NORM.weight is not None
    assert NORM.bias is not None
    return RowNorm(NORM.weight.to(dtype), NORM.bias.to(dtype), NORM.eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
def test_linear(dtype, activation, norm):
    given, bias = factors(48, 40, 12, dtype), normal(48, seed=2).to(dtype)
    linear = LinearLowRank(given, bias, activation=activation)
    rows = linear.compute_dtype
    x, residual = normal(19, 40).to(rows), normal(19, 48, seed=3).to(rows)
    after = norm_of(rows) if norm else None
    act = {None: lambda y: y, "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
           "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}[activation]  # fmt: skip

    def meant(dtype: torch.dtype) -> torch.Tensor:
        y = F.linear(F.linear(x.to(dtype), given.a.to(dtype)), given.b.to(dtype), bias.to(dtype))
        y = act(y) + residual.to(dtype)
        if after is None:
            return y
        return F.layer_norm(y, (48,), after.weight.to(dtype), after.bias.to(dtype), after.eps)

    ours = linear(x, residual=residual, norm=after)
    assert ours.dtype == rows
    assert_close_to_native(ours, meant(rows), meant(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 40, 300])
def test_feed_forward_is_its_two_layers(dtype, count):
    up = LinearLowRank(factors(150, 48, 20, dtype), normal(150).to(dtype), activation="gelu")
    down = LinearLowRank(factors(48, 150, 33, dtype), normal(48).to(dtype))
    rows = normal(count, 48).to(up.compute_dtype)
    norm = norm_of(up.compute_dtype)
    expected = down(up(rows), residual=rows, norm=norm)
    assert_exact(FeedForwardLowRank(up, down)(rows, norm=norm), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_and_copies(dtype):
    linear = LinearLowRank(
        factors(48, 40, 12, dtype), normal(48).to(dtype), activation="gelu", sizes=[16, 32]
    )
    again = linear_from_config(json.loads(json.dumps(linear.config())))
    assert again.config() == linear.config()
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    x = normal(5, 40).to(linear.compute_dtype)
    for other in (again, copy.deepcopy(linear)):
        assert_exact(other(x), linear(x))
    down = LinearLowRank(factors(40, 48, 9, dtype))
    part = FeedForwardLowRank(linear, down)
    made = feed_forward_from_config(part.config())
    assert type(made) is FeedForwardLowRank
    assert made.config() == part.config()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_factors_stand_for(dtype):
    given = factors(48, 40, 12, dtype)
    linear = LinearLowRank(given, sizes=[16, 32])
    assert_exact(linear.factors.a, given.a)
    assert_exact(linear.factors.b, given.b)
    whole = torch.cat(linear.dense_weights())
    assert whole.dtype == dtype
    torch.testing.assert_close(
        whole.float(), given.b.float() @ given.a.float(), rtol=1e-2, atol=1e-2
    )
    assert linear.weight_bytes == (12 * 40 + 48 * 12 + 4 * 40) * dtype.itemsize  # 12 of 16 outputs
    assert "rank 12" in linear.kernel


def test_refuses_what_does_not_fit():
    good = factors(48, 40, 12)
    for make, said in (
        (lambda: Factors(good.a, good.b.T), "need .R, K. and .N, R."),
        (lambda: Factors(good.a, good.b.half()), "of one dtype"),
        (lambda: LinearLowRank(good, normal(47)), "bias: got"),
        (lambda: LinearLowRank(good, activation="tanh"), "activation: got 'tanh'"),
        (lambda: LinearLowRank(good, sizes=[16, 16]), "sizes: got"),
        (lambda: FeedForwardLowRank(LinearLowRank(good), LinearLowRank(good)), "down: got 40"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    linear = LinearLowRank(good)
    for cast in (lambda: linear.half(), lambda: linear.to("meta")):
        with pytest.raises(RuntimeError, match="cannot be cast or moved"):
            cast()
    with pytest.raises(RuntimeError, match="inference only"):
        linear(normal(3, 40).requires_grad_())


def attention(dtype: torch.dtype = torch.float32, rank: int = 20) -> LowRankAttention:
    linear = LinearLowRank(
        factors(3 * 64, 48, rank, dtype), normal(3 * 64).to(dtype), sizes=[64, 64, 64]
    )
    return LowRankAttention(linear, 4, 0.25, splits_query=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("behind", [0, 5], ids=["", "rows_behind"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "key_bias"])
def test_attention_is_one_with_whole_query_key_and_value(dtype, behind, biased):
    ours = attention(dtype)
    dense = DenseAttention([ours.query_key_value], 4, 0.25)
    bias = normal(46, seed=3) if biased else None
    batch = replace(PackedBatch.from_lengths([5, 0, 40, 1]), key_bias=bias)
    rows = normal(46 + behind, 48).to(ours.query_key_value.compute_dtype)
    assert_exact(ours(rows, batch)[:46], dense(rows, batch)[:46])
    first = rows[batch.starts]
    expected = ours(rows, batch)[batch.starts]
    got = ours.forward_first(rows, first, batch)
    kept = batch.lengths > 0
    assert_close_to_native(got[kept], expected[kept], expected[kept].double())


def test_a_rank_in_use_is_that_of_cut_factors():
    given = factors(3 * 64, 48, 33)
    x, batch = normal(46, 48), PackedBatch.from_lengths([6, 40])
    whole = LinearLowRank(given, sizes=[64, 64, 64])
    whole.rank_in_use = 17
    cut = LinearLowRank(given.cut(17), sizes=[64, 64, 64])
    assert_exact(whole(x), cut(x))
    assert "rank 17 of 33" in whole.kernel
    made = [LowRankAttention(one, 4, 0.25, splits_query=True) for one in (whole, cut)]
    for run in (
        lambda one: one(x, batch), lambda one: one.forward_first(x, x[batch.starts], batch),
    ):  # fmt: skip
        assert_exact(*map(run, made))
    parts = [
        FeedForwardLowRank(
            one,
            LinearLowRank(factors(48, 192, 9)),
        )
        for one in (whole, cut)
    ]
    assert_exact(*(part(x, norm=NORM) for part in parts))
    for rank in (0, 34):
        with pytest.raises(ValueError, match="need 1 to 33"):
            whole.rank_in_use = rank


def test_attention_comes_back_from_its_config():
    ours = attention()
    again = attention_from_config(json.loads(json.dumps(ours.config())), None)
    assert again.config() == ours.config()
    again.load_state_dict(ours.state_dict())
    batch, rows = PackedBatch.from_lengths([7, 30]), normal(37, 48)
    assert_exact(again(rows, batch), ours(rows, batch))
    with pytest.raises(ValueError, match="heads of a multiple of 16"):
        LowRankAttention(LinearLowRank(factors(3 * 60, 48, 9)), 3, 0.25, splits_query=False)
