"""linear_grouped and linear_grouped_codes against exact integers and float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import normal
from filbert import explain, ops
from filbert.ops import linear_grouped, linear_grouped_codes
from filbert.ops._linear_grouped import (
    reference_linear_grouped,
    reference_linear_grouped_codes,
    unpack_groups,
)
from filbert.ops.shared import calling
from grouped import BITS, code_rows, integers, sums_of, weight_of
from machine_code import needs_machine_code, stack_moves
from tolerances import assert_close_to_native, assert_codes, assert_exact

all_bits = pytest.mark.parametrize("bits", BITS)

#: rows, inputs, outputs: no multiple of any tile unless it is there to be one
SHAPES = [
    (1, 1, 1), (2, 31, 17), (3, 32, 16), (5, 100, 33), (12, 64, 32), (13, 513, 47), (4, 768, 65),
    (25, 260, 80), (97, 96, 31), (2, 3072, 20), (130, 40, 16), (0, 8, 8), (3, 8, 0), (7, 2048, 16),
]  # fmt: skip


@pytest.mark.every_order
@all_bits
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(backend, shape, bits):
    rows, inputs, outputs = shape
    weight = weight_of(outputs, inputs, bits)
    codes, scale, zero = code_rows(rows, inputs)
    ours = linear_grouped(codes, x_scale=scale, x_zero=zero, **weight.given)
    exact = sums_of(codes, zero, weight)
    assert_exact(ours, exact.float() * scale[:, None] * weight.scale)


@pytest.mark.every_order
@all_bits
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
@pytest.mark.parametrize("small", [False, True], ids=["", "small"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_groups_along_the_inputs(backend, bits, group, zeros, small):
    for rows, inputs, outputs in ((1, 128, 20), (3, 768, 33), (14, 640, 16), (33, 1152, 40)):
        weight = weight_of(outputs, inputs, bits, group=group, zeros=zeros, small=small)
        codes, scale, zero = code_rows(rows, inputs)
        ours = linear_grouped(codes, x_scale=scale, x_zero=zero, **weight.given)
        exact = sums_of(codes, zero, weight)
        assert_exact(ours, exact.float() * scale[:, None] * weight.scale)


@all_bits
@pytest.mark.parametrize("lowest", [True, False], ids=["lowest", "highest"])
@pytest.mark.parametrize("group", [None, 32])
def test_nothing_saturates(backend, bits, lowest, group):
    """All codes 255, all weights at one end: the largest sums there are."""
    for rows, inputs in ((1, 512), (2, 4096), (9, 256)):
        codes = torch.full((40, inputs), 0 if lowest else (1 << bits) - 1)
        weight = weight_of(40, inputs, bits, codes=codes)
        if group is not None:
            most = (2**31 - 1) // (inputs * 255 << (bits - 1))
            multiplier = torch.full((40, inputs // group), min(255, most), dtype=torch.uint8)
            weight.given["multiplier"] = ops.pack_groups(multiplier)
            weight.given["totals"] = ops.grouped_totals(codes.to(torch.uint8), bits, multiplier)
            weight.numbers = weight.numbers * min(255, most)
        x = torch.full((rows, inputs), 255, dtype=torch.uint8)
        x[:, ::2] = 254  # odd totals
        one, zero = torch.ones(rows), torch.zeros(rows, dtype=torch.int32)
        zero[-1] = 255
        ours = linear_grouped(x, x_scale=one, x_zero=zero, **weight.given)
        assert_exact(ours, sums_of(x, zero, weight).float() * weight.scale)


@all_bits
def test_numbers_become_codes(backend, bits):
    """Rows of numbers give what their codes give, bit for bit."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = weight_of(50, 200, bits, exact=False)
        for rows in (1, 5, 60):
            x = normal(rows, 200, dtype=dtype)
            codes, scale, zero = ops.quantize_rows(x)
            through = linear_grouped(codes, x_scale=scale, x_zero=zero, dtype=dtype, **weight.given)
            assert_exact(linear_grouped(x, **weight.given), through)


@all_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_the_references(backend, dtype, bits):
    """Without an activation all of it is a few IEEE operations in one order: the same bits."""
    weight = weight_of(70, 256, bits, group=64 if bits % 2 == 0 else None, exact=False)
    x, bias = normal(21, 256, dtype=dtype), normal(70, seed=2)
    residual = normal(21, 70, dtype=dtype, seed=3)
    ours = linear_grouped(x, bias=bias, residual=residual, **weight.given)
    expected = reference_linear_grouped(x, bias=bias, residual=residual, **weight.given)
    assert_exact(ours, expected)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "none"])
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("rows", [3, 110])
def test_what_follows_the_product(backend, dtype, activation, norm, rows):
    weight = weight_of(70, 128, 4, exact=False)
    codes, scale, zero = code_rows(rows, 128)
    scale = scale / 8
    bias, residual = normal(70, seed=2), normal(rows, 70, dtype=dtype, seed=3)
    gamma, beta = normal(70, dtype=dtype, seed=4), normal(70, dtype=dtype, seed=5)
    ours = linear_grouped(
        codes, x_scale=scale, x_zero=zero, bias=bias, activation=activation, residual=residual,
        **({"norm_weight": gamma, "norm_bias": beta, "eps": 1e-5} if norm else {}), dtype=dtype,
        **weight.given,
    )  # fmt: skip
    product = sums_of(codes, zero, weight) * scale.double()[:, None] * weight.scale.double()

    def follow(y, dtype, between):
        y = ACTIVATIONS.get(activation, lambda y: y)(y + bias.to(dtype)).to(between).to(dtype)
        y = y + residual.to(dtype)
        return F.layer_norm(y, (70,), gamma.to(dtype), beta.to(dtype), 1e-5) if norm else y

    exact = follow(product, torch.float64, torch.float64)
    native = follow(product.float(), torch.float32, dtype if norm else torch.float32).to(dtype)
    assert ours.dtype == dtype
    assert_close_to_native(ours, native, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["gelu", "norm"])
@pytest.mark.parametrize("rows", [1, 5, 70, 203])
def test_codes_of_the_result(backend, dtype, norm, rows):
    weight = weight_of(300, 96, 3, exact=False)
    x = normal(rows, 96, dtype=dtype)
    named = {"activation": "gelu", "bias": normal(300, seed=2)}
    if norm:
        named = {
            "residual": normal(rows, 300, dtype=dtype, seed=3), "eps": 1e-5,
            "norm_weight": normal(300, dtype=dtype, seed=4),
            "norm_bias": normal(300, dtype=dtype, seed=5),
        }  # fmt: skip
    out, *codes = linear_grouped_codes(x, **named, **weight.given)
    theirs, *_ = reference_linear_grouped_codes(x, **named, **weight.given)
    assert out.shape == theirs.shape
    assert out.dtype == theirs.dtype == dtype
    if norm:
        assert_exact(out, linear_grouped(x, **named, **weight.given))
    wide, _ = ops._linear_grouped._reference(
        x, *(weight.given[n] for n in ("weight", "scale", "totals", "bits")), None, None, None,
        None, named.get("bias"), named.get("activation", "none"), named.get("residual"),
        named.get("norm_weight"), named.get("norm_bias"), 1e-5, dtype,
    )  # fmt: skip
    assert_codes(codes, wide)


@pytest.mark.any_isa
@pytest.mark.parametrize("bits", [3, 6, 8])
def test_a_row_has_the_same_bits_in_any_batch(backend, bits):
    weight = weight_of(200, 256, bits, group=64, exact=False)
    x, residual = normal(150, 256), normal(150, 200, seed=3)
    named = {
        "bias": normal(200, seed=2), "activation": "gelu", "norm_weight": normal(200, seed=4),
        "norm_bias": normal(200, seed=5), "eps": 1e-5,
    }  # fmt: skip

    def run(at):
        return linear_grouped_codes(x[at], residual=residual[at], **named, **weight.given)

    alone = [
        torch.cat(parts) for parts in zip(*(run(slice(i, i + 1)) for i in range(150)), strict=True)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3) if backend == "cpu" else (1,):  # the CPU's are torch's
            torch.set_num_threads(threads)
            for count in (2, 3, 5, 12, 13, 25, 49, 97, 150):
                for ours, expected in zip(run(slice(150 - count, 150)), alone, strict=True):
                    assert_exact(ours, expected[150 - count :])
    finally:
        torch.set_num_threads(before)


@all_bits
def test_a_bad_row_stays_alone(backend, bits):
    weight = weight_of(40, 96, bits, exact=False)
    x = normal(20, 96)
    clean = linear_grouped(x, **weight.given)
    x[3, 7], x[11, 95], x[12, 0] = torch.nan, torch.inf, -torch.inf
    ours = linear_grouped(x, **weight.given)
    bad = [3, 11, 12]
    assert ours[bad].isnan().all()
    others = [i for i in range(20) if i not in bad]
    assert_exact(ours[others], clean[others])
    _, _, scale, _ = linear_grouped_codes(x, **weight.given)
    assert scale.isnan().nonzero().flatten().tolist() == bad
    x[:] = 0
    assert_exact(linear_grouped(x, **weight.given), torch.zeros(20, 40))


def test_rows_with_a_stride(backend):
    weight = weight_of(50, 96, 4, exact=False)
    wide, codes = normal(33, 300), integers(0, 256, 33, 300).to(torch.uint8)
    part = slice(100, 196)
    assert_exact(
        linear_grouped(wide[:, part], **weight.given),
        linear_grouped(wide[:, part].clone(), **weight.given),
    )
    _, scale, zero = code_rows(33, 1)
    assert_exact(
        linear_grouped(codes[:, part], x_scale=scale, x_zero=zero, **weight.given),
        linear_grouped(codes[:, part].clone(), x_scale=scale, x_zero=zero, **weight.given),
    )


@all_bits
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (48, 256), (0, 5), (5, 0)], ids=str)
def test_packing_is_reversible(bits, shape):
    codes = integers(0, 1 << bits, *shape).to(torch.uint8)
    packed = ops.pack_grouped(codes, bits)
    assert packed.is_contiguous()
    assert packed.shape == (-(-shape[0] // 16), -(-shape[1] // 32), 64 * bits)
    assert_exact(ops.unpack_grouped(packed, bits, *shape), codes)
    groups = integers(0, 256, shape[0], 3).to(torch.uint8)
    assert_exact(unpack_groups(ops.pack_groups(groups), shape[0]), groups)
    with pytest.raises(ValueError, match=r"packed: got .* need .* try pack_grouped"):
        ops.unpack_grouped(packed, bits, shape[0] + 16, shape[1])


def test_packing_refuses():
    with pytest.raises(ValueError, match="bits: got 5, need one of 2, 3, 4, 6, 8"):
        ops.pack_grouped(torch.zeros(4, 4, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match=r"codes: got \(4, 4\) torch.float32, need uint8"):
        ops.pack_grouped(torch.zeros(4, 4), 4)
    with pytest.raises(ValueError, match=r"codes: got 16, need less than 2\*\*4"):
        ops.pack_grouped(torch.full((4, 4), 16, dtype=torch.uint8), 4)
    codes = torch.zeros(2, 4096, dtype=torch.uint8)
    with pytest.raises(ValueError, match="groups: got 3 of 4096 inputs"):
        ops.grouped_totals(codes, 4, torch.ones(2, 3, dtype=torch.uint8))
    multiplier = torch.tensor([[1] * 64, [255] * 64], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"output 1: its sum can reach .* try smaller multipliers"):
        ops.grouped_totals(codes, 8, multiplier)


GIVEN = weight_of(20, 64, 4).given
X = torch.zeros(2, 64)
CODES = {"x_scale": torch.ones(2), "x_zero": torch.zeros(2, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (X, {"bits": 5}, "bits; got 5; need 2, 3, 4, 6 or 8"),
        (X, {"bits": 3}, r"need a contiguous \[2, 2, 192\] for 20 outputs of 64 inputs and 3 bits"),
        (X[:, :40], {}, None),
        (X[:, :20], {}, r"weight; got \[2, 2, 256\]; need a contiguous \[2, 1, 256\]"),
        (X.byte(), {}, "codes without them; need both for codes"),
        (X, CODES, "numbers with them"),
        (X.byte(), CODES | {"x_scale": torch.ones(3)}, "x_scale; got"),
        (X.double(), {}, "dtype of x"),
        (X.t(), {}, r"x; got \[64, 2\]"),
        (X, {"scale": torch.ones(20).double()}, "dtype of scale"),
        (X, {"totals": torch.ones(21).int()}, "totals; got"),
        (X, {"multiplier": torch.ones(2, 3, 16).byte()}, "inputs of a group; got 64"),
        (X, {"multiplier": torch.ones(2, 1, 15).byte()}, "multiplier; got"),
        (X, {"multiplier": torch.ones(2, 2, 16).byte(), "offset": torch.ones(2, 1, 16).int()},
         "groups of offset"),
        (X, {"bias": torch.ones(20).bfloat16()}, "dtype of bias; got BFloat16; need Float"),
        (X, {"activation": "tanh"}, "activation; got tanh"),
        (X, {"residual": torch.ones(2, 19)}, "residual; got"),
        (X, {"norm_weight": torch.ones(20)}, "norm_weight and norm_bias"),
        (X.byte(), CODES | {"dtype": torch.float64}, "dtype; got float64"),
    ],
)  # fmt: skip
def test_refuses(x, change, message):
    if message is None:  # 40 inputs take two units, too
        linear_grouped(x, **GIVEN)
        return
    for op in (linear_grouped, linear_grouped_codes):
        with pytest.raises(RuntimeError, match=message):
            op(x, **(GIVEN | change))


@pytest.mark.parametrize("name", ["linear_grouped", "linear_grouped_codes"])
def test_opcheck(backend, name):
    given = weight_of(20, 64, 4, group=32, zeros=True).given
    norm = (torch.ones(20), torch.ones(20)) if "codes" in name else (None, None)
    operator = getattr(calling.kernels(), name).default
    torch.library.opcheck(
        operator,
        (normal(3, 64), given["weight"], given["scale"], given["totals"], 4, None, None,
         given["multiplier"], given["offset"], None, "none", None, *norm),
    )  # fmt: skip


def test_explains():
    given = weight_of(20, 64, 4, group=32).given
    text = str(explain("linear_grouped", torch.zeros(3, 64), **given))
    assert "7,680 operations on 8-bit integers" in text
    assert "4 bits, 2 panels of 16 outputs, 2 groups of inputs" in text


@needs_machine_code
def test_sums_stay_in_registers():
    """In no tile is a vector moved to or from the stack."""
    moves = stack_moves(r"fixed_tile<[^\n]*(?:Quads|Chains|Halves)")
    assert {isa for isa, _ in moves} == {"avx2", "avx2_vnni", "avx512", "avx512_vnni"}
    assert not {name: moved[:3] for name, moved in moves.items() if moved}
