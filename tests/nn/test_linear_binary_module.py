"""LinearBinary and what it is made of: tiles, packers, thresholds found by bisection."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from binary_reference import above, below, bibert_weight, binarybert_weight, bit_weight
from filbert.nn import (
    DotPacker,
    LinearBinary,
    LinearBinarySum,
    RowPacker,
    integer_threshold_of,
    threshold_of,
    weight_tiles,
)
from filbert.ops.shared.words import codes_to_words
from filbert.packed.bits import PackedBits
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 1), (16, 32), (48, 80), (33, 70), (7, 129)]
ALWAYS, NEVER = -(2**31), 2**31 - 1


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_of(weight, bias=None):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear.requires_grad_(False)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_tiles_lie_as_documented(n, k):
    bits = (random(n, k) > 0).long()
    tiles, totals = weight_tiles(bits)
    assert tiles.shape == (-(-n // 16), -(-k // 32), 16)
    for row in range(n):
        for column in range(k):
            word = int(tiles[row // 16, column // 32, row % 16])
            assert word >> column % 32 & 1 == bits[row, column]
    assert sum(bin(int(w) & 0xFFFFFFFF).count("1") for w in tiles.flatten()) == bits.sum()
    assert_exact(totals, (2 * bits - 1).sum(1).int())


@pytest.mark.parametrize("bad", [torch.ones(3), torch.full((2, 2), 2), torch.full((2, 2), -1.0)])
def test_tiles_refuse_what_is_no_bit(bad):
    with pytest.raises(ValueError, match="need \\[N, K\\] of zeros and ones"):
        weight_tiles(bad)


def test_thresholds_are_the_expression_itself():
    """At the threshold and its neighbours, and wherever else, the comparison is the expression."""
    a, b = random(200).abs() + 1e-3, random(200, seed=1)

    def bit(x):
        return ((x.relu() + b) / a).round() >= 1

    t = threshold_of(bit, 200)
    steps = [
        t,
        t.nextafter(torch.tensor(-9.0)),
        t.nextafter(torch.tensor(9.0)),
        random(200, seed=2),
    ]
    steps += [t + 1e-3, t - 1e-3, torch.zeros(200), torch.full((200,), torch.inf), -torch.ones(200)]
    for x in steps:
        assert_exact(x >= t, bit(x))
    naive = a / 2 - b  # what solving for it gives, which must not be what the test accepts
    assert (naive[b < a / 2] != t[b < a / 2]).any()
    assert (t[b > a / 2] == -torch.inf).all()


def test_a_half_rounds_to_even():
    """x / a = 1/2 becomes 0, as torch.round has it, and anything more 1."""
    x = torch.tensor([[0.5, 0.25, 1.5]])
    scales = RowPacker.elastic(3, 1.0, torch.tensor([0.0, 0.25, -1.0]))
    assert scales(x).unpack().tolist() == [[0.0, 0.0, 0.0]]
    assert scales(x + 1e-6).unpack().tolist() == [[1.0, 1.0, 1.0]]


def test_threshold_ends():
    t = threshold_of(lambda x: torch.stack([x[0] < 0, x[1] > 3e38, x[2] == torch.inf]) & False, 3)
    assert t.isnan().all()
    assert threshold_of(lambda x: x >= torch.inf, 2).tolist() == [torch.inf] * 2
    assert threshold_of(lambda x: x > -torch.inf, 1)[0] == torch.finfo(torch.float32).min
    zero = threshold_of(lambda x: x >= 0, 1)
    assert zero.item() == 0.0
    tiny = threshold_of(lambda x: x > 0, 1)
    assert 0 < tiny.item() < 2e-45


def test_integer_threshold_ends():
    found = integer_threshold_of(lambda d: d >= torch.tensor([-9, 4, 7, 8]), 4, -7, 7)
    assert found.tolist() == [ALWAYS, 4, 7, NEVER]


@pytest.mark.parametrize("scheme", ["bibert", "bit", "binarybert"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_schemes_are_their_formulas(scheme, n, k):
    weight, bias, x = random(n, k), random(n, seed=1), random(5, k, seed=2)
    shift, a = random(k, seed=3) * 0.3, 0.7
    layer, exact = linear_of(weight, bias), weight.double()
    x[0, 0] = 0.0
    if scheme == "bibert":
        got = LinearBinary.from_linear(layer, scheme, ties="exact")(x)
        expected = F.linear(x.double().sign(), bibert_weight(exact), bias.double())
    elif scheme == "bit":
        got = LinearBinary.from_linear(
            layer, scheme, ties="exact", input_scale=a, input_shift=shift
        )(x)
        signs = (x.double() + shift.double()).sign()
        expected = F.linear(a * signs, bit_weight(exact), bias.double())
    else:
        got = LinearBinary.from_linear(layer, scheme, input_scale=0.03)(x)
        codes = (x.double() / 0.03).round().clamp(-128, 127)
        expected = F.linear(0.03 * codes, binarybert_weight(exact), bias.double())
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=2e-6)


def test_bits_after_relu():
    """BiT's {0, 1} inputs, shift and all, against the formula in float32."""
    weight, x = random(40, 80), random(9, 80, seed=1).relu()
    shift, a = random(80, seed=2) * 0.5, 0.6
    layer = LinearBinary.from_linear(
        linear_of(weight), "bit", unsigned=True, input_scale=a, input_shift=shift
    )
    codes = ((x + shift) / torch.tensor(a)).round().clamp(0, 1)
    assert 0 < codes.mean() < 1
    assert_exact(layer.pack(x).unpack(), codes)
    torch.testing.assert_close(layer(x), a * F.linear(codes, bit_weight(weight)))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("into", ["sign", "below", "above", "exact", "shift", "elastic"])
def test_bits_out_are_the_bits_of_the_numbers(activation, into):
    """For every integer the product can be: what the next layer would pack of the eager number."""
    n = 60
    layer = LinearBinary.from_bits(
        random(n, 45) > 0, random(n, seed=1) * 0.4, random(n, seed=2), RowPacker.sign(45)
    )
    layer.alpha[:4] = 0.0
    layer.alpha[3] = torch.tensor(0.5)
    assert layer.bias is not None
    layer.bias[:4] = torch.tensor([0.0, 1.0, -1.0, -1.5])  # alpha 0; and 0 at the integer 3
    packer = {
        "sign": RowPacker.sign(n),
        "shift": RowPacker.sign(n, random(n, seed=3) * 0.2, "above"),
        "elastic": RowPacker.elastic(n, 0.5, random(n, seed=3) * 0.2),
    }.get(into) or RowPacker.sign(n, ties=into)
    codes = layer.codes_for(packer, activation)
    act = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu}[activation]
    underflown = 0
    for dot in range(-45, 46):
        dots = torch.full((n,), dot)
        number = act(layer.value(dots))
        got = codes(partial(codes_of, dots))
        expected = packer(number[None]).unpack()
        differs = (got.unpack() != expected)[0]
        # GELU's -0.0 is an exception, but for signs of 0 kept: negative, as its argument is.
        excused = (layer.value(dots) < -5) & (number == 0) & (activation == "gelu")
        underflown += int(differs.sum())
        assert not (differs & ~excused).any()
        if into == "exact":
            assert not differs.any()
        assert int(got.sums) == int(got.unpack_codes().sum())
        assert not (got.words[..., -1] >> 28 & 0xF).any()  # what pads the 60 channels
    assert (underflown > 0) == (activation == "gelu" and into == "above")


def codes_of(dots, above, until=None, lower=None, lower_until=None):
    """What linear_binary_bits makes of one row of dot products."""

    def bit(start, end):
        return (dots >= start) if end is None else (dots >= start) | (dots < end)

    codes = bit(above, until).long()
    if lower is None and lower_until is None:
        return codes_to_words(codes[None], 1)
    codes += bit(above if lower is None else lower, lower_until)
    return codes_to_words(codes[None], 2)


def test_gelu_between_signs_costs_nothing():
    """One threshold, that of the plain sign, unless a shift or signs of 0 kept ask for more."""
    layer = LinearBinary.from_bits(random(20, 900) > 0, random(20, seed=1), random(20, seed=2))
    plain = layer.codes_for(RowPacker.sign(20))
    fast = layer.codes_for(RowPacker.sign(20), "gelu")
    assert_exact(fast.above, plain.above)
    assert fast.above_until is fast.at is None
    exact = layer.codes_for(RowPacker.sign(20, ties="exact"), "gelu")
    assert exact.ternary
    assert exact.at_until is not None
    assert exact.at is exact.above_until is None  # 0 is a tie for no integer but the underflown
    shifted = layer.codes_for(RowPacker.sign(20, torch.full((20,), 0.1)), "gelu")
    assert shifted.above_until is not None  # 0 < 0.1 < 0.17: two edges


@pytest.mark.parametrize("ties", ["below", "above", "exact"])
def test_forward_bits_through_the_operator(ties):
    layer = LinearBinary.from_linear(linear_of(random(50, 80), torch.zeros(50)), ties=ties)
    x = random(30, 80, seed=1)
    x[:, :2] = 0.0
    sign = {"below": below, "above": above, "exact": torch.sign}[ties]
    signs = sign(x.double()) @ (2.0 * layer.weight_bits().double() - 1).T
    assert (signs == 0).any()  # an even number of ±1
    got = layer.forward_bits(x, layer.codes_for(RowPacker.sign(50, ties=ties)))
    assert got.planes == (2 if ties == "exact" else 1)
    assert_exact(got.unpack(torch.float64), sign(signs))


def test_ints_as_thresholds():
    layer = LinearBinary.from_linear(linear_of(random(20, 40)))
    x = random(6, 40, seed=1)
    product = layer(x) / layer.alpha
    thresholds = torch.arange(-10, 10, dtype=torch.int32)
    got = layer.forward_bits(x, thresholds)
    assert_exact(got.unpack(), 2.0 * (product.round() >= thresholds).float() - 1)


def test_weights_at_their_mean():
    weight = torch.tensor([[2.0] * 4, [0.0] * 4, [1.0, 3.0, 2.0, 2.0], [-1.0, 1.0, -1.0, 1.0]])
    layer = LinearBinary.from_linear(linear_of(weight, random(4)))
    assert layer.weight_ties == 2  # of the third row; constant rows are 0 as in the reference
    assert layer.alpha.tolist() == [0.0, 0.0, 2.0, 1.0]
    x = random(5, 4, seed=1)
    expected = F.linear(x.sign(), bibert_weight(weight), layer.bias)
    rows = [0, 1, 3]
    torch.testing.assert_close(layer(x)[:, rows], expected[:, rows])
    assert not torch.allclose(layer(x)[:, 2], expected[:, 2])
    assert layer.weight_bits()[2].tolist() == [0, 1, 0, 0]
    strict = LinearBinary.from_linear(linear_of(weight), weight_ties="above")
    assert strict.weight_bits()[2].tolist() == [0, 1, 1, 1]
    assert strict.alpha.tolist() == [2.0, 0.0, 2.0, 1.0]
    assert LinearBinary.from_linear(linear_of(weight), "binarybert").weight_ties == 0


def test_a_negative_alpha_flips_the_row():
    bits, alpha = random(20, 50) > 0, random(20, seed=1)
    layer = LinearBinary.from_bits(bits, alpha)
    assert (alpha < 0).any()
    assert (layer.alpha >= 0).all()
    x = random(3, 50, seed=2)
    torch.testing.assert_close(layer(x), F.linear(below(x), alpha[:, None] * (2.0 * bits - 1)))


def test_shapes_residual_norm_and_dtype():
    layer = LinearBinary.from_linear(linear_of(random(24, 40), random(24, seed=1)))
    x, residual = random(2, 3, 40, seed=2), random(2, 3, 24, seed=3)
    norm = torch.nn.LayerNorm(24, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(random(24, seed=4))
    y = layer(x)
    assert y.shape == (2, 3, 24)
    got = layer(x, residual=residual, norm=norm)
    torch.testing.assert_close(got, norm(y + residual), rtol=2e-5, atol=2e-5)
    packed = layer.pack(x)
    assert_exact(layer(packed), y.flatten(0, 1))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x[0].T.contiguous().T).shape == (3, 24)
    assert layer(x[:0]).shape == (0, 3, 24)


def test_refusals():
    linear = linear_of(random(16, 32))
    layer = LinearBinary.from_linear(linear)
    for call, words in (
        (lambda: layer(random(3, 33)), "need float rows"),
        (lambda: layer(torch.ones(3, 32, dtype=torch.int64)), "need float rows"),
        (lambda: layer(PackedBits.signs(random(3, 31))), "got 31 features, need 32"),
        (lambda: LinearBinary.from_linear(linear, "xnor"), "scheme: got 'xnor'"),
        (lambda: LinearBinary.from_linear(linear, input_scale=1.0), "input_scale: got one"),
        (lambda: LinearBinary.from_linear(linear_of(random(2, 2) / 0)), "finite floats"),
        (lambda: LinearBinary.from_linear(linear, ties="zero"), "ties: got 'zero'"),
        (lambda: LinearBinary.from_bits(random(3, 4) > 0, torch.ones(4)), "alpha: got"),
        (lambda: RowPacker(4, bits=3), "bits: got 3"),
        (lambda: RowPacker(4, static=True), "need 2, 4 or 8"),
        (lambda: RowPacker(4, bits=4, threshold=True), "need bits=1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    codes = LinearBinary.from_linear(linear, "binarybert").pack(random(3, 32))
    with pytest.raises(ValueError, match="cannot know the scale"):
        layer.forward_bits(codes, torch.zeros(16, dtype=torch.int32))


def test_no_gradient():
    layer = LinearBinary.from_linear(torch.nn.Linear(32, 16))
    x = random(3, 32).requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        layer(x)
    with pytest.raises(RuntimeError, match="inference only"):
        layer(random(3, 32), residual=random(3, 16).requires_grad_())
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert not layer(x.detach()).requires_grad


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_few_bits(bits, signed):
    x = random(6, 70)
    x[1] = 0.0
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    static = RowPacker.uniform(70, bits, signed=signed, scale=0.1)(x)
    assert_exact(static.unpack_codes() + low, (x / 0.1).round().clamp(low, high).long())
    rows = RowPacker.uniform(70, bits, signed=signed)(x)
    source = x if signed else x.clamp(min=0)
    step = source.abs().amax(1, keepdim=True) / high
    assert (rows.unpack() - source).abs().max() <= step.max() * 0.5001
    assert_exact(rows.unpack()[1], torch.zeros(70))
    alone = RowPacker.uniform(70, bits, signed=signed)(x[2:3])
    assert_exact(alone.unpack()[0], rows.unpack()[2])  # whatever other rows hold
    clipped = RowPacker.uniform(70, bits, signed=True, scale=0.5, clip=0.5)(x)
    assert clipped.unpack().abs().max() <= 0.5


def test_one_layer_of_three():
    parts = [
        LinearBinary.from_linear(linear_of(random(32, 40, seed=i), random(32))) for i in range(3)
    ]
    whole = LinearBinary.concat(parts)
    x = random(5, 40, seed=9)
    assert_exact(whole(x), torch.cat([part(x) for part in parts], 1))
    odd = LinearBinary.from_linear(linear_of(random(20, 40), random(20)))
    with pytest.raises(ValueError, match="multiples of 16"):
        LinearBinary.concat([odd, odd])
    other = LinearBinary.from_linear(linear_of(random(32, 40), random(32)), ties="above")
    with pytest.raises(ValueError, match="different packers"):
        LinearBinary.concat([parts[0], other])


def test_sum_of_terms():
    terms = [
        LinearBinary.from_linear(
            linear_of(random(24, 40, seed=i), random(24, seed=5 + i)), "binarybert", input_scale=s
        )
        for i, s in enumerate((0.05, 0.02))
    ]
    both = LinearBinarySum(terms)
    x, residual = random(4, 40, seed=8), random(4, 24, seed=9)
    norm = torch.nn.LayerNorm(24).requires_grad_(False)
    torch.testing.assert_close(both(x), terms[0](x) + terms[1](x))
    expected = norm(terms[0](x) + terms[1](x) + residual)
    torch.testing.assert_close(
        both(x, residual=residual, norm=norm), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copier):
    layer = LinearBinary.from_linear(linear_of(random(20, 40), random(20)))
    x = random(3, 40, seed=1)
    assert_exact(copier(layer)(x), layer(x))


def test_state_and_config_make_the_layer_again():
    layer = LinearBinary.from_linear(
        linear_of(random(20, 40), random(20)), "bit", input_scale=0.3, input_shift=random(40)
    )
    assert set(layer.state_dict()) == {"weight", "alpha", "bias", "packer.threshold"}
    again = LinearBinary.from_config(layer.config())
    again.load_state_dict(layer.state_dict())
    x = random(3, 40, seed=1)
    assert_exact(again.totals, layer.totals)
    assert_exact(again(x), layer(x))


def test_casts_move_but_never_round():
    layer = LinearBinary.from_linear(linear_of(random(20, 40), random(20)))
    before = layer.alpha.clone()
    layer.bfloat16()
    assert_exact(layer.alpha, before)
    assert layer.weight.dtype == torch.int32
    assert layer.to("meta").alpha.device.type == "meta"


def test_dot_packers_zeros_in_one_pass():
    signs = RowPacker.sign(8, ties="exact")
    counts = DotPacker(lambda d: d.float(), 99, signs)
    assert counts.all_tie
    shifted = RowPacker.sign(8, torch.full((8,), 0.5), "exact")
    assert not DotPacker(lambda d: d.float(), 99, shifted).ternary  # no integer is -0.5
