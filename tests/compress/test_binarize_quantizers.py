"""Quantizers of one-bit BERTs against formulas written here, and their gradients by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from binarized import expected_weight, values
from filbert.compress import binarize as bz

NAN = float("nan")


def gradient(function, *inputs: Tensor) -> list[Tensor]:
    """The gradients of ``sum(weights * function(inputs))`` with weights 1, 2, 3, ..."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), leaves))


@pytest.mark.parametrize(
    ("ties", "expected"),
    [
        ("below", [-1, -1, -1, 1, -1]),
        ("above", [-1, 1, 1, 1, -1]),
        ("zero", [-1, 0, 0, 1, 0]),
    ],
)
def test_sign_of_zero_and_nan(ties: str, expected: list[int]) -> None:
    x = torch.tensor([-1e-30, -0.0, 0.0, 1e-30, NAN])
    assert bz.sign(x, ties).tolist() == expected
    assert bz.sign_ste(x, ties).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sign_ste_is_exact_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    """Values are bits, not bits to rounding: the detach-and-add spelling fails here."""
    x = (values(4096, seed=1) * 0.7).to(dtype)
    out = bz.sign_ste(x, "below")
    assert out.dtype == dtype
    assert set(out.tolist()) == {-1.0, 1.0}


def test_sign_gradient_is_clipped_identity() -> None:
    x = torch.tensor([-1.5, -1.0, -0.3, 0.0, 0.9, 1.0, 1.001])
    assert gradient(bz.sign_ste, x)[0].tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_bool() -> None:
    x = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5, NAN])
    assert bz.bool_ste(x).tolist() == [0, 0, 0, 1, 1, 0]
    assert bz.bool_ste(x, "above").tolist() == [0, 0, 1, 1, 1, 0]
    assert gradient(bz.bool_ste, x)[0].tolist() == [0, 2, 3, 4, 0, 0]
    with pytest.raises(ValueError, match="ties of bool: got 'zero', need one of 'below', 'above'"):
        bz.bool_ste(x, "zero")


# Weights


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_weight_against_its_formula(scheme: str, granularity: str) -> None:
    # The means are far from 0, so that centring the wrong way flips many signs.
    w = values(7, 33, dtype=torch.float64) + values(7, 1, seed=5, dtype=torch.float64)
    got = bz.binarize_weight(w, scheme, granularity)
    np.testing.assert_allclose(got, expected_weight(w.numpy(), scheme, granularity), rtol=1e-12)
    alpha, signs = bz.weight_parts(w, scheme, granularity)
    assert torch.equal(got, alpha * signs)
    assert alpha.shape == ((7, 1) if granularity == "row" else ())


@pytest.mark.parametrize(
    ("scheme", "default"), [("bibert", "row"), ("bit", "tensor"), ("binarybert", "row")]
)
def test_weight_granularity_of_each_scheme(scheme: str, default: str) -> None:
    w = values(5, 16)
    assert torch.equal(bz.binarize_weight(w, scheme), bz.binarize_weight(w, scheme, default))


def test_alpha_is_of_the_raw_row() -> None:
    """A row far from zero: its mean |W| is 10, of the centred row it would be 1."""
    w = torch.tensor([[9.0, 11.0, 9.0, 11.0]])
    assert bz.binarize_weight(w, "bibert").tolist() == [[-10, 10, -10, 10]]


@pytest.mark.parametrize("ties", bz.TIES)
@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_weight_rows_without_a_sign(scheme: str, ties: str) -> None:
    zeros = bz.binarize_weight(torch.zeros(2, 8), scheme, "row", ties)
    assert zeros.abs().max() == 0  # alpha is 0, whatever the ties
    constant = bz.binarize_weight(torch.full((2, 8), 0.5), scheme, "row", ties)
    tied = {"below": -0.5, "above": 0.5, "zero": 0.0}[ties]
    wanted = 0.5 if scheme == "binarybert" else tied  # the others centre it to 0
    assert constant.tolist() == [[wanted] * 8] * 2


def test_nan_in_a_weight_reaches_its_rows_scale() -> None:
    w = values(3, 8)
    w[1, 2] = NAN
    assert bz.weight_parts(w, "bibert")[0].isnan().flatten().tolist() == [False, True, False]


def test_weight_gradients() -> None:
    w = torch.tensor([[3.0, 0.5, -0.5, -3.0]])  # its mean is 0, two lie outside [-1, 1]
    for scheme in ("bit", "binarybert"):
        got = gradient(lambda x, s=scheme: bz.binarize_weight(x, s), w)[0]
        assert got.tolist() == [[1, 2, 3, 4]]
    # The weights 1 to 4, clipped to [0, 2, 3, 0], then through W - mean(W): minus their mean.
    got = gradient(lambda x: bz.binarize_weight(x, "bibert"), w)[0]
    assert got.tolist() == [[-1.25, 0.75, 1.75, -1.25]]


# Elastic binarization


def test_elastic_sign() -> None:
    x, a = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.4, 0.5, 0.6, NAN]), torch.tensor(0.5)
    got = bz.elastic_sign(x, a)
    assert got[:7].tolist() == [-0.5, -0.5, -0.5, 0, 0.5, 0.5, 0.5]
    assert bz.elastic_sign(x, a, "below")[[3, 7]].tolist() == [-0.5, -0.5]
    by_x, by_a = gradient(bz.elastic_sign, x[:7], a)
    assert by_x.tolist() == [0, 2, 3, 4, 5, 6, 0]
    assert by_a.item() == -1 - 2 - 3 + 5 + 6 + 7


def test_elastic_bits() -> None:
    a = torch.tensor(2.0)
    x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 7.0, NAN])
    assert bz.elastic_bits(x, a).tolist() == [0, 0, 0, 0, 2, 2, 2, 0]  # 1.0 is a/2: to even
    by_x, by_a = gradient(bz.elastic_bits, x[:7], a)
    assert by_x.tolist() == [0, 2, 3, 4, 5, 0, 0]
    # With q = x / a: 0 below; -q, then 1 - q within; 1 above.
    assert by_a.item() == pytest.approx(3 * -0.25 + 4 * -0.5 + 5 * 0.25 + 6 + 7)


@pytest.mark.parametrize("form", ["sign", "bits"])
def test_elastic_against_float64(form: str) -> None:
    x = values(64, 9)
    quantizer = bz.ElasticBinarizer(9, form).train()
    with torch.no_grad():
        quantizer.move.copy_(values(9, seed=3))
    got = quantizer(x)
    shifted = x.double().numpy() + quantizer.move.detach().double().numpy()
    a = (2 if form == "sign" else 4) * np.abs(shifted).mean()
    assert quantizer.scale.item() == pytest.approx(a, rel=1e-6)
    a = quantizer.scale.double().item()
    level = np.sign(shifted) if form == "sign" else np.clip(np.rint(shifted / a), 0, 1)
    np.testing.assert_allclose(got.detach(), a * level, rtol=1e-6)


def test_floor_of_a_scale() -> None:
    """A scale that training drove below zero still binarizes, and still has a gradient."""
    x, a = torch.tensor([1.0, -1.0]), torch.tensor(-3.0)
    assert bz.elastic_sign(x, a).tolist() == pytest.approx([1e-5, -1e-5])
    assert bz.elastic_bits(x, a).tolist() == pytest.approx([1e-5, 0])
    assert gradient(bz.elastic_sign, x, a)[1].item() == 1 - 2


def test_scale_is_calibrated_once_and_says_so() -> None:
    quantizer = bz.ElasticBinarizer(4)
    with pytest.raises(RuntimeError, match="got a scale that no batch has set, need one; try"):
        quantizer.eval()(values(2, 4))
    assert not quantizer.calibrated
    quantizer.train()(torch.full((2, 4), 0.5))  # gives the scale 1.0, which is no sign of anything
    assert quantizer.calibrated
    assert quantizer.scale.item() == 1.0
    quantizer(torch.full((2, 4), 7.0))
    assert quantizer.scale.item() == 1.0
    with pytest.raises(ValueError, match="calibration: got a scale of nan"):
        bz.ElasticBinarizer(4)(torch.full((2, 4), NAN))


# A few bits


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", bz.BITS)
def test_uniform_against_float64(bits: int, signed: bool) -> None:
    x = values(40, 12) * 3
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step = torch.tensor(0.0625)
    level = x.double().numpy() / 0.0625
    rounded = np.clip(np.rint(level), low, high)
    np.testing.assert_array_equal(bz.uniform(x, step, bits, signed), 0.0625 * rounded)
    by_x, by_step = gradient(lambda x, s: bz.uniform(x, s, bits, signed), x, step)
    weights = np.arange(1, x.numel() + 1).reshape(x.shape)
    inside = (level >= low) & (level <= high)
    np.testing.assert_array_equal(by_x, weights * inside)
    expected = weights * np.where(inside, rounded - level, rounded)
    assert by_step.item() == pytest.approx(expected.sum(), rel=1e-4)

    rows = x.double()
    rows[0] = 0
    source = rows.numpy() if signed else rows.numpy().clip(0)
    top = np.abs(source).max(axis=1, keepdims=True)
    steps = np.where(top == 0, 1, top / high)
    np.testing.assert_allclose(
        bz.uniform_rows(rows, bits, signed), np.rint(source / steps) * steps, rtol=1e-12
    )


def test_uniform_nan_and_errors() -> None:
    x = torch.tensor([[1.0, NAN], [1.0, 2.0]])
    assert bz.uniform(x, torch.tensor(0.1), 8).isnan().tolist() == [[False, True], [False] * 2]
    assert bz.uniform_rows(x, 8).isnan().tolist() == [[True, True], [False, False]]
    with pytest.raises(ValueError, match="bits: got 3, need one of 2, 4, 8"):
        bz.uniform(x, torch.tensor(0.1), 3)


def test_row_quantizer_has_nothing_to_learn() -> None:
    quantizer = bz.UniformQuantizer(4, mode="row").eval()
    assert quantizer.calibrated
    assert not list(quantizer.parameters())
    first = values(3, 8)
    both = torch.cat([first, values(3, 8, seed=9) * 100])
    assert torch.equal(quantizer(both)[:3], quantizer(first))
