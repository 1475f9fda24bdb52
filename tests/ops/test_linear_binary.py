"""linear_binary and linear_binary_bits against integer and float64 products."""

from __future__ import annotations

import pytest
import torch

from bit_rows import code_rows, integers, weights
from cases import DTYPES, normal
from filbert import _load, ops
from filbert.ops.shared import calling
from filbert.ops.shared.words import codes_to_words, words_to_bits, words_to_codes
from tolerances import assert_close_to_native, assert_exact

#: rows, inputs, outputs: no multiple of any tile unless it is there to be one
SHAPES = [
    (1, 1, 1), (3, 31, 17), (6, 64, 64), (7, 100, 63), (13, 300, 130), (2, 768, 768),
    (130, 96, 48), (5, 3072, 80), (129, 40, 65), (4, 256, 31), (33, 128, 256),
]  # fmt: skip
#: planes, step and low: ±1, {0, 1}, ternary, unsigned and signed codes
INPUTS = {
    "signs": (1, 2, -1), "zero_one": (1, 1, 0), "ternary": (2, 1, -1), "two_bits": (2, 1, 0),
    "four_bits": (4, 1, -8), "eight_bits": (8, 1, -128), "zero_point": (8, 1, -117),
}  # fmt: skip
LEAST, MOST = -(2**31), 2**31 - 1


def dots(codes, signs, step, low):
    """The exact product; float64 holds these integers."""
    return ((step * codes + low).double() @ signs.double().T).long()


@pytest.mark.every_order
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_bits_out(backend, shape, kind):
    rows, features, outputs = shape
    planes, step, low = INPUTS[kind]
    codes, words, sums = code_rows(rows, features, planes)
    signs, tiles, totals = weights(outputs, features)
    exact = dots(codes, signs, step, low)
    threshold = exact[0].clone()  # ties in the first row, chance in the others
    threshold[::5], threshold[1::5] = LEAST, MOST
    got, ones = ops.linear_binary_bits(
        words, sums, tiles, totals, threshold.int(), step=step, low=low
    )
    expected = (exact >= threshold).long()
    assert_exact(words_to_codes(got, outputs), expected)
    assert_exact(ones, expected.sum(1).to(torch.int32))
    assert not words_to_bits(got, 32 * got.shape[2])[..., outputs:].any()


#: which of ``until``, ``lower`` and ``lower_until`` are given
EDGES = [("until",), ("lower",), ("lower_until",), ("lower", "lower_until"),
         ("until", "lower", "lower_until")]  # fmt: skip


@pytest.mark.parametrize("edges", EDGES, ids="+".join)
@pytest.mark.parametrize("shape", [(2, 768, 100), (13, 300, 130), (129, 40, 65)], ids=str)
def test_codes_out(backend, shape, edges):
    """A second interval of ones, and a second bit: what GELU makes of signs, in one product."""
    rows, features, outputs = shape
    planes, step, low = INPUTS["ternary"]
    codes, words, sums = code_rows(rows, features, planes)
    signs, tiles, totals = weights(outputs, features)
    exact = dots(codes, signs, step, low)
    ends = {"threshold": exact[0].clone(), "until": exact[0] - 3, "lower": exact[0] - 1,
            "lower_until": exact[-1] - 5}  # fmt: skip
    for at, (name, end) in enumerate(ends.items()):  # ties in one row, chance in the others
        end[at::9], end[at + 1 :: 9] = LEAST, MOST
        ends[name] = end.int()
    given = {name: ends[name] for name in edges}
    got, ones = ops.linear_binary_bits(
        words, sums, tiles, totals, ends["threshold"], step=step, low=low, **given
    )
    upper = exact >= ends["threshold"]
    lower = exact >= ends["lower"] if "lower" in edges else upper.clone()
    if "until" in edges:
        upper |= exact < ends["until"]
    if "lower_until" in edges:
        lower |= exact < ends["lower_until"]
    expected = upper.long() if edges == ("until",) else upper.long() + lower.long()
    assert got.shape[0] == (1 if edges == ("until",) else 2)
    assert_exact(words_to_codes(got, outputs), expected)
    assert_exact(ones, expected.sum(1).to(torch.int32))
    assert not words_to_bits(got, 32 * got.shape[2])[..., outputs:].any()


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5])
@pytest.mark.parametrize("shape", [(1, 768, 80), (33, 768, 130), (130, 1200, 48)], ids=str)
def test_zeros_in_rows_of_signs(backend, shape, density):
    """Few zeros are counted another way than many, and none not at all: the numbers are the same,
    whichever rows share a tile."""
    rows, features, outputs = shape
    codes = 2 * integers(0, 2, rows, features)
    random = torch.Generator().manual_seed(3)
    zeros = torch.rand(rows, features, generator=random, device="cpu") < density
    zeros[rows // 2] = False  # a row without any, and one of nothing else
    zeros[-1] = density > 0
    codes[zeros.to(codes.device)] = 1
    words, sums = codes_to_words(codes, 2)
    signs, tiles, totals = weights(outputs, features)
    got = ops.linear_binary(words, sums, tiles, totals, torch.ones(outputs), step=1, low=-1)
    assert_exact(got, dots(codes, signs, 1, -1).float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_numbers_out(backend, shape, kind):
    """Small powers of two as scales keep every result exact, whatever order it is made in."""
    rows, features, outputs = shape
    planes, step, low = INPUTS[kind]
    codes, words, sums = code_rows(rows, features, planes)
    signs, tiles, totals = weights(outputs, features)
    alpha = torch.exp2(integers(-2, 3, outputs).float())
    alpha[-1] = 0.0
    exact = dots(codes, signs, step, low).double() * alpha
    got = ops.linear_binary(words, sums, tiles, totals, alpha, step=step, low=low)
    assert_exact(got, exact.float())
    bias, scale = integers(-9, 9, outputs).float(), torch.exp2(integers(-1, 2, rows).float())
    residual = integers(-99, 99, rows, outputs).float()
    got = ops.linear_binary(
        words, sums, tiles, totals, alpha, bias, scale, step=step, low=low, residual=residual
    )
    assert_exact(got, (exact * scale[:, None] + bias + residual).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 100, 40), (130, 768, 768), (3, 64, 17)], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_epilogue(backend, dtype, shape, norm, with_residual):
    rows, features, outputs = shape
    codes, words, sums = code_rows(rows, features, 1)
    signs, tiles, totals = weights(outputs, features)
    alpha, bias = normal(outputs).abs() * 0.05, normal(outputs, seed=2)
    residual = normal(rows, outputs, seed=3, dtype=dtype) if with_residual else None
    gamma, beta = (normal(outputs, seed=s, dtype=dtype) for s in (4, 5))
    fused = {"norm_weight": gamma, "norm_bias": beta, "eps": 1e-12} if norm else {}
    got = ops.linear_binary(
        words, sums, tiles, totals, alpha, bias, residual=residual, dtype=dtype, **fused
    )
    assert got.dtype == dtype

    def by_torch(to: torch.dtype) -> torch.Tensor:
        y = torch.nn.functional.linear(
            (2 * codes - 1).to(to), (alpha[:, None] * signs).to(to), bias.to(to)
        )
        y = y if residual is None else y + residual.to(to)
        if not norm:
            return y
        return torch.nn.functional.layer_norm(y, (outputs,), gamma.to(to), beta.to(to), 1e-12)

    # Two roundings to a short dtype are natural here: one of the product, one of the norm.
    assert_close_to_native(got, by_torch(dtype), by_torch(torch.float64), factor=3.0)


@pytest.mark.every_order
@pytest.mark.parametrize("kind", ["signs", "ternary"])
def test_more_large_tiles_than_multiprocessors(backend, kind):
    """Where large tiles would leave multiprocessors idle, small ones run: a GPU makes large ones of
    such a layer only from some thousand rows on. Its tiles need more shared memory than every
    kernel may have, and the last ones stick out of the layer on both sides."""
    outputs, features = 520, 3072
    count = torch.cuda.get_device_properties().multi_processor_count if backend == "cuda" else 1
    rows = 128 * (1 + count // 5) + 4  # five tiles lie side by side
    planes, step, low = INPUTS[kind]
    codes, words, sums = code_rows(rows, features, planes)
    signs, tiles, totals = weights(outputs, features)
    exact = dots(codes, signs, step, low)
    threshold = exact[rows - 1].clone()
    got, ones = ops.linear_binary_bits(
        words, sums, tiles, totals, threshold.int(), step=step, low=low
    )
    expected = (exact >= threshold).long()
    assert_exact(words_to_codes(got, outputs), expected)
    assert_exact(ones, expected.sum(1).to(torch.int32))
    alpha, bias = torch.ones(outputs), integers(-9, 9, outputs).float()
    got = ops.linear_binary(words, sums, tiles, totals, alpha, bias, step=step, low=low)
    assert_exact(got, (exact + bias).float())


def test_a_row_is_the_same_in_any_batch(backend):
    _, words, sums = code_rows(150, 768, 1)
    _, tiles, totals = weights(200, 768)
    threshold = torch.zeros(200, dtype=torch.int32)
    alpha = normal(200).abs()
    bits, _ = ops.linear_binary_bits(words, sums, tiles, totals, threshold)
    numbers = ops.linear_binary(words, sums, tiles, totals, alpha)
    for r in (0, 7, 149):
        one = (words[:, r : r + 1], sums[r : r + 1], tiles, totals)
        assert_exact(ops.linear_binary_bits(*one, threshold)[0][:, 0], bits[:, r])
        assert_exact(ops.linear_binary(*one, alpha)[0], numbers[r])


def test_a_plane_of_a_larger_tensor(backend):
    """Rows that are a view: a slice of columns, and every other row."""
    codes, words, _sums = code_rows(10, 256, 1)
    signs, tiles, totals = weights(40, 64)
    alpha = torch.ones(40)
    part = words[:, ::2, 2:4]
    part_sums = codes[::2, 64:128].sum(1).to(torch.int32)
    got = ops.linear_binary(part, part_sums, tiles, totals, alpha)
    assert_exact(got, dots(codes[::2, 64:128], signs, 2, -1).float())


def test_a_weight_that_begins_anywhere(backend):
    """A GPU reads weights 16 bytes at a time where it may; elsewhere another kernel runs."""
    codes, words, sums = code_rows(40, 96, 1)
    signs, tiles, totals = weights(48, 96)
    buffer = torch.zeros(tiles.numel() + 1, dtype=torch.int32)
    buffer[1:] = tiles.flatten()
    moved = buffer[1:].view(tiles.shape)
    residual = normal(1, 48).expand(40, 48)
    got = ops.linear_binary(words, sums, moved, totals, torch.ones(48), residual=residual)
    assert_exact(got, dots(codes, signs, 2, -1).float() + residual)


@pytest.mark.parametrize("shape", [(0, 64, 32), (5, 0, 32), (5, 64, 0)], ids=str)
def test_nothing_to_multiply(backend, shape):
    rows, features, outputs = shape
    _, words, sums = code_rows(rows, features, 1)
    _, tiles, totals = weights(outputs, features)
    got = ops.linear_binary(words, sums, tiles, totals, torch.ones(outputs), torch.ones(outputs))
    expected = torch.ones(rows, outputs)
    assert_exact(got, expected if features == 0 else expected[:, :outputs])
    bits, ones = ops.linear_binary_bits(
        words, sums, tiles, totals, torch.zeros(outputs, dtype=torch.int32)
    )
    assert bits.shape == (1, rows, outputs // 32)
    assert ones.tolist() == [outputs] * rows  # 0 >= 0 where there are no inputs


def test_the_longest_rows(backend):
    """65504 inputs, all of them ones: counts do not overflow."""
    words = torch.full((1, 2, 2047), -1, dtype=torch.int32)
    sums = torch.full((2,), 65504, dtype=torch.int32)
    tiles = torch.full((1, 2047, 16), -1, dtype=torch.int32)
    totals = torch.full((16,), 65504, dtype=torch.int32)
    got = ops.linear_binary(words, sums, tiles, totals, torch.ones(16))
    assert_exact(got, torch.full((2, 16), 65504.0))
    eight = words.expand(8, -1, -1)
    got = ops.linear_binary(eight, 255 * sums, tiles, totals, torch.ones(16), step=1, low=0)
    assert_exact(got, torch.full((2, 16), 255 * 65504.0))


def test_threads_do_not_change_bits(threads):
    codes, words, sums = code_rows(300, 320, 1)
    signs, tiles, totals = weights(200, 320)
    got = ops.linear_binary(words, sums, tiles, totals, torch.ones(200))
    assert_exact(got, dots(codes, signs, 2, -1).float())


_, WORDS, SUMS = code_rows(3, 64, 1)
_, TILES, TOTALS = weights(20, 64)
ALPHA = torch.ones(20)
REFUSALS = {
    "planes": ((WORDS[0], SUMS, TILES, TOTALS, ALPHA), {}, "1 to 8 planes"),
    "rows": (
        (WORDS[:, :1].expand(-1, 2**31, -1), SUMS, TILES, TOTALS, ALPHA), {}, r"fewer than 2\^31",
    ),
    "word_dtype": ((WORDS.long(), SUMS, TILES, TOTALS, ALPHA), {}, "Int"),
    "sums": ((WORDS, SUMS[:2], TILES, TOTALS, ALPHA), {}, "contiguous vector"),
    "tiles": ((WORDS, SUMS, TILES[:1], TOTALS, ALPHA), {}, r"\[ceil\(N / 16\), W, 16\]"),
    "features": ((WORDS[:, :, :1], SUMS, TILES, TOTALS, ALPHA), {}, "the W of words"),
    "alpha": ((WORDS, SUMS, TILES, TOTALS, ALPHA.double()), {}, "Float"),
    "step": ((WORDS, SUMS, TILES, TOTALS, ALPHA), {"step": 3}, "step; got 3; need 1 or 2"),
    "low": ((WORDS, SUMS, TILES, TOTALS, ALPHA), {"low": 1 << 20}, "-16384 to 16384"),
    "dtype": ((WORDS, SUMS, TILES, TOTALS, ALPHA), {"dtype": torch.float64}, "float32"),
    "norm": ((WORDS, SUMS, TILES, TOTALS, ALPHA), {"norm_weight": ALPHA}, "both or none"),
    "residual": ((WORDS, SUMS, TILES, TOTALS, ALPHA), {"residual": ALPHA}, r"\[T, N\]"),
    "device": ((WORDS, SUMS.to("meta"), TILES, TOTALS, ALPHA), {}, "got meta"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "more", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(args, more, message):
    with pytest.raises(RuntimeError, match=message):
        ops.linear_binary(*args, **more)


@pytest.mark.any_isa
def test_opcheck(backend):
    kernels = calling.kernels()
    _, words, sums = code_rows(3, 64, 2)
    _, tiles, totals = weights(20, 64)
    given = (words, sums, tiles, totals)
    ones = torch.ones(20)
    torch.library.opcheck(kernels.linear_binary.default, (*given, ones))
    torch.library.opcheck(
        kernels.linear_binary.default,
        (*given, ones, ones, torch.ones(3), 1, -1, torch.ones(3, 20), ones, ones, 1e-5, "float32"),
    )
    torch.library.opcheck(kernels.linear_binary_bits.default, (*given, totals, 1, 0))
    edges = (totals, totals, totals)
    torch.library.opcheck(kernels.linear_binary_bits.default, (*given, totals, 1, 0, *edges))


@pytest.mark.parametrize(
    ("capability", "tensor_cores"), [(75, False), (80, True), (90, True), (100, False)]
)
def test_plan_on_a_gpu(capability, tensor_cores):
    plan = _load.C.plan_linear_binary_cuda(
        rows=8192, outputs=768, row_words=24, planes=1, multiprocessors=132, capability=capability
    )
    assert plan["tensor_cores"] is tensor_cores
    covered = plan["blocks"] * plan["tile_rows"] * plan["tile_outputs"]
    assert covered >= 8192 * 768
    assert plan["shared_bytes"] <= 99 * 1024
    few = _load.C.plan_linear_binary_cuda(
        rows=1, outputs=768, row_words=24, planes=1, multiprocessors=132, capability=capability
    )
    assert few["tensor_cores"] is False
    with pytest.raises(ValueError, match="a plane"):
        _load.C.plan_linear_binary_cuda(1, 1, 1, 0, 1, 90)
