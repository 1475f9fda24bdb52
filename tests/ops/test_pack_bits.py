"""pack_bits and pack_codes against comparisons and roundings of float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import DTYPES, normal
from filbert import PackedBits, ops
from filbert.ops._pack_bits import reference_pack_codes
from filbert.ops.shared import calling
from filbert.ops.shared.words import words_to_bits, words_to_codes
from tolerances import assert_exact

WIDTHS = [1, 31, 32, 33, 100, 768, 3072]
TIES = ["below", "above", "exact"]


def awkward(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Many ties with 0 and with halves, signed zeros, and what is no number."""
    x = (normal(rows, width) * 4).round() / 2
    x[0, 0] = -0.0
    if width > 4:
        x[-1, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    if rows > 3:
        x[1], x[2] = 0.0, 1.5  # constant rows
    return x.to(dtype)


def expected_codes(x: torch.Tensor, threshold, ties: str) -> torch.Tensor:
    x, threshold = x.double(), 0.0 if threshold is None else threshold.double()
    if ties == "exact":
        return torch.where(x > threshold, 2, torch.where(x == threshold, 1, 0))
    return (x > threshold).long() if ties == "below" else (x >= threshold).long()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("given", [False, True], ids=["zero", "thresholds"])
def test_bits(backend, dtype, width, ties, given):
    x = awkward(7, width, dtype)
    threshold = (normal(width, seed=3) * 2).round() / 2 if given else None
    words, sums = ops.pack_bits(x, threshold, ties)
    codes = expected_codes(x, threshold, ties)
    assert words.shape == (2 if ties == "exact" else 1, 7, (width + 31) // 32)
    assert_exact(words_to_codes(words, width), codes)
    assert_exact(sums, codes.sum(1).to(torch.int32))
    # What pads a row is zero.
    past = words_to_bits(words, 32 * words.shape[2])[..., width:]
    assert not past.any()


def test_the_layout_is_what_is_documented(backend):
    x = -torch.ones(1, 40)
    x[0, 0] = x[0, 31] = x[0, 33] = 1.0
    words, sums = ops.pack_bits(x)
    assert words.flatten().tolist() == [1 - 2**31, 2]
    assert sums.tolist() == [3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 33, 768])
@pytest.mark.parametrize("low", ["signed", "unsigned", "shifted"])
def test_codes(backend, dtype, bits, width, low):
    x = awkward(6, width, dtype)
    lowest = {"signed": -(2 ** (bits - 1)), "unsigned": 0, "shifted": 3}[low]
    scale = torch.tensor([0.5, 0.25, 0.0, 2.0, 0.125, 1.0])  # powers of two: quotients are exact
    words, sums, used = ops.pack_codes(x, bits, lowest, scale)
    assert_exact(used, scale)
    quotient = torch.where(scale[:, None] == 0, 0.0, x.double() / scale.double()[:, None])
    quotient = torch.where(quotient.isnan(), 0.0, quotient)
    codes = quotient.clamp(-1e6, 1e6).round().clamp(lowest, lowest + 2**bits - 1).long() - lowest
    assert_exact(words_to_codes(words, width), codes)
    assert_exact(sums, codes.sum(1).to(torch.int32))


def test_codes_of_any_scale(backend):
    """Halves of a scale that is no power of two tie as its float32 reciprocal makes them."""
    scale = torch.tensor([0.7, 1e-39, -0.3, torch.nan, torch.inf])
    x = torch.arange(-60, 60).float() * 0.35
    rows = x.repeat(5, 1)
    rows[1] *= 1e-39
    words, _, _ = ops.pack_codes(rows, 8, -128, scale)
    inverse = torch.where((1 / scale).isfinite(), 1 / scale, 0.0)
    levels = (rows * inverse[:, None]).double().round().clamp(-128, 127)
    assert_exact(words_to_codes(words, 120), levels.long() + 128)
    assert not levels[[1, 3, 4]].any()


@pytest.mark.every_order
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scale_of_each_row(backend, bits):
    """The largest finite magnitude of a row is coded as the largest code, its negative likewise."""
    x = normal(5, 70)
    x[1] = 0.0
    x[2, 5], x[3, 7] = torch.inf, torch.nan
    words, _, scale = ops.pack_codes(x, bits, -(2 ** (bits - 1)))
    finite = torch.where(x.isfinite(), x, 0.0).abs().amax(1)
    # On the CPU: PyTorch on a GPU multiplies by the reciprocal of a number.
    assert_exact(scale.cpu(), finite.cpu() / (2 ** (bits - 1) - 1))
    values = words_to_codes(words, 70) - 2 ** (bits - 1)
    error = (values * scale[:, None] - x)[[0, 4]].abs().amax(1)
    assert (error <= scale[[0, 4]] * 0.5001).all()
    assert not values[1].any()
    assert values[3, 7] == 0
    assert values[2, 5] == 2 ** (bits - 1) - 1
    # No row depends on another.
    for r in range(5):
        alone, _, own = ops.pack_codes(x[r : r + 1], bits, -(2 ** (bits - 1)))
        assert_exact(alone[:, 0], words[:, r])
        assert_exact(own, scale[r : r + 1])


def test_strided_rows(backend):
    buffer = normal(9, 100)
    x = buffer[::2, 10:80]
    words, sums = ops.pack_bits(x)
    expected, expected_sums = ops.pack_bits(x.contiguous())
    assert_exact(words, expected)
    assert_exact(sums, expected_sums)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)], ids=str)
def test_nothing_to_pack(backend, shape):
    words, sums = ops.pack_bits(torch.zeros(shape))
    assert words.shape == (1, shape[0], shape[1] // 32)
    assert sums.tolist() == [0] * shape[0]
    for make in (ops.pack_codes, reference_pack_codes):
        words, sums, scale = make(torch.zeros(shape), 4, -8)
        assert words.shape == (4, shape[0], shape[1] // 32)
        assert sums.tolist() == scale.tolist() == [0] * shape[0]


def test_one_row_for_all(backend):
    x = normal(1, 70)
    assert_exact(ops.pack_bits(x.expand(4, 70))[0], ops.pack_bits(x.repeat(4, 1))[0])


def test_threads_do_not_change_bits(threads):
    x = normal(300, 700)
    codes = (x > 0).long()
    assert_exact(words_to_codes(ops.pack_bits(x)[0], 700), codes)


def test_packed_bits_unpack_to_what_they_stand_for(backend):
    x = awkward(5, 50, torch.float32)[:-1]
    assert_exact(PackedBits.signs(x, ties="exact").unpack(), torch.sign(x))
    assert_exact(PackedBits.signs(x).unpack(), torch.where(x > 0, 1.0, -1.0))
    assert_exact(PackedBits.signs(x, ties="above").unpack(), torch.where(x >= 0, 1.0, -1.0))
    assert_exact(PackedBits.bits(x).unpack(), (x > 0).float())
    packed = PackedBits.codes(normal(4, 50), 8)
    assert (packed.unpack() - normal(4, 50)).abs().max() <= packed.scale.max() * 0.5001
    assert packed.shape == (4, 50)
    assert packed.planes == 8
    assert packed.nbytes == 4 * (8 * 4 * 2 + 4 + 4)
    with pytest.raises(ValueError, match="third value"):
        PackedBits.bits(x, ties="exact")
    moved = packed.to(packed.words.device)
    assert_exact(moved.unpack(), packed.unpack())


X = torch.zeros(3, 40)
REFUSALS = {
    "rank": (lambda: ops.pack_bits(X[0]), r"need \[T, K\]"),
    "columns": (lambda: ops.pack_bits(torch.zeros(4, 3).t()), "contiguous rows"),
    "dtype": (lambda: ops.pack_bits(X.long()), "float32"),
    "ties": (lambda: ops.pack_bits(X, None, "middle"), "'below', 'above' or 'exact'"),
    "threshold_length": (lambda: ops.pack_bits(X, torch.zeros(3)), "contiguous vector"),
    "threshold_dtype": (lambda: ops.pack_bits(X, torch.zeros(40).double()), "Float"),
    "device": (lambda: ops.pack_bits(X, torch.zeros(40, device="meta")), "got meta"),
    "columns_of_x": (lambda: ops.pack_bits(torch.zeros(1, 65505)), "at most 65504"),
    "rows_of_x": (lambda: ops.pack_bits(X[:1].expand(2**31, -1)), r"fewer than 2\^31"),
    "rows_of_codes": (lambda: ops.pack_codes(X[:1].expand(2**31, -1), 8, 0), r"fewer than 2\^31"),
    "bits": (lambda: ops.pack_codes(X, 3, 0), "2, 4 or 8"),
    "low": (lambda: ops.pack_codes(X, 8, 1 << 20), "-16384 to 16384"),
    "scale_length": (lambda: ops.pack_codes(X, 8, 0, torch.ones(4)), "contiguous vector"),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_the_reference_divides_by_no_python_number():
    """On a GPU that would be a multiplication by the rounded reciprocal, and another scale."""
    divisors = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "div" in str(function):
                divisors.append(args[1])
            return function(*args, **(kwargs or {}))

    with Watch():
        reference_pack_codes(X, 8, -128)
    assert divisors
    assert all(isinstance(divisor, torch.Tensor) for divisor in divisors)


@pytest.mark.any_isa
@pytest.mark.parametrize("ties", TIES)
def test_opcheck(backend, ties):
    kernels = calling.kernels()
    x = normal(3, 40)
    torch.library.opcheck(kernels.pack_bits.default, (x, torch.zeros(40), ties))
    torch.library.opcheck(kernels.pack_codes.default, (x, 4, -8))
    torch.library.opcheck(kernels.pack_codes.default, (x, 8, 0, torch.ones(3)))
