"""Factors of few bits: what their modules compute, and models with them."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from torch.nn import functional as F

import filbert
from cases import normal
from filbert.compress.quantize.rounding import round_to_nearest
from filbert.nn import GroupedFactors, LinearLowRankGrouped, RowNorm, load_encoder
from filbert.nn.kinds import linear_from_config
from models import MASKS, build, swapped
from models import run as run_padded
from tolerances import assert_cosine, assert_exact

ALL_BITS = pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])


def factors(outputs: int, inputs: int, rank: int, bits: int) -> GroupedFactors:
    a, b = normal(rank, inputs) * inputs**-0.5, normal(outputs, rank, seed=1) * rank**-0.5
    return GroupedFactors(round_to_nearest(a, bits), round_to_nearest(b, bits))


@ALL_BITS
def test_it_is_two_layers_of_few_bits(bits):
    given, bias = factors(48, 64, 20, bits), normal(48, seed=2)
    linear = LinearLowRankGrouped(given, bias, activation="gelu", sizes=[16, 32])
    x, residual = normal(19, 64), normal(19, 48, seed=3)
    norm = RowNorm(normal(48, seed=4), normal(48, seed=5), 1e-5)
    ours = linear(x, residual=residual, norm=norm)
    assert_exact(ours, linear.second(linear.first.forward_codes(x), residual=residual, norm=norm))
    wide = F.gelu(F.linear(x.double(), given.weight.double(), bias.double())) + residual
    exact = F.layer_norm(wide, (48,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert_cosine(ours, exact, 0.999)
    codes = linear.forward_codes(x)
    back = (codes.codes.float() - codes.zero[:, None].float()) * codes.scale[:, None]
    assert_cosine(back, F.gelu(F.linear(x, given.weight, bias)).double(), 0.999)
    assert "rank 20" in linear.kernel
    assert linear.weight_bytes < 48 * 64 * 4


def test_files_and_copies():
    linear = LinearLowRankGrouped(factors(48, 64, 20, 4), normal(48), activation="gelu")
    again = linear_from_config(json.loads(json.dumps(linear.config())))
    assert again.config() == linear.config()
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file))
    x = normal(5, 64)
    for other in (again, copy.deepcopy(linear)):
        assert_exact(other(x), linear(x))
    (weight,) = linear.dense_weights()
    assert_exact(weight, linear.factors.weight)
    with pytest.raises(ValueError, match=r"need \[R, K\] and \[N, R\]"):
        GroupedFactors(linear.first.weight, linear.first.weight)
    with pytest.raises(ValueError, match="sizes: got"):
        LinearLowRankGrouped(linear.factors, sizes=[3])


def run(model) -> torch.Tensor:
    """The hidden states of kept tokens."""
    return run_padded(model)[MASKS["right"].bool()]


SIZES = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_with_them(tmp_path, bits):
    model = build("bert", **SIZES)
    made = filbert.factorize(copy.deepcopy(model), ranks=16, factor_bits=bits)
    encoder = swapped(made)
    kinds = {type(linear) for layer in encoder.layers for _, linear in layer.linears()}
    assert kinds == {LinearLowRankGrouped}
    ours = run(made)
    encoder.save(tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    batch = filbert.PackedBatch.from_lengths([5, 0, 9])
    rows = normal(14, encoder.hidden_size)
    with torch.inference_mode():
        assert_exact(loaded.forward_packed(rows, batch), encoder.forward_packed(rows, batch))
    # Its float weights are the products of the codes; what differs is rows of 8-bit codes.
    assert_cosine(ours, run(filbert.revert(made)).double(), 0.999)


def test_more_bits_are_nearer_to_the_factors():
    model = build("bert", **SIZES)
    exact = run(filbert.factorize(copy.deepcopy(model), ranks=16)).double()

    def error(bits):
        made = filbert.factorize(copy.deepcopy(model), ranks=16, factor_bits=bits)
        return float((run(made) - exact).norm() / exact.norm())

    assert error(8) < 0.3 * error(4) < error(2)
    with pytest.raises(ValueError, match="bits: got 5"):
        filbert.factorize(model, ranks=16, factor_bits=5)
