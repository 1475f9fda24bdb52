"""embedding_grouped against its tables, dequantized."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cases import DTYPES, normal
from filbert import explain
from filbert.ops import embedding_grouped, pack_table
from filbert.ops._embedding_grouped import reference_embedding_grouped, unpack_table
from filbert.ops.shared import calling
from grouped import integers
from tolerances import assert_close_to_native, assert_exact

WIDTHS = [2, 7, 16, 33, 384, 768, 1030]


def tables(width, bits=8, rows=9):
    """Ids, codes and scale of words, positions and token types."""
    found = []
    for seed, (entries, own) in enumerate(((50, bits), (20, 8), (2, bits))):
        codes, scale = pack_table(normal(entries, width, seed=seed), own)
        found += [integers(0, entries, rows, seed=seed), codes, scale]
    return found


def given(made, count):
    words, rest = made[:3], made[3:]
    names = [
        f"{what}_{name}" for what in ("position", "type") for name in ("ids", "codes", "scale")
    ]
    return words, dict(zip(names[: 3 * count], rest[: 3 * count], strict=True))


@pytest.mark.every_order
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("others", [0, 1, 2])
def test_sums_are_the_references(backend, width, bits, others):
    for rows in (0, 1, 9):
        words, rest = given(tables(width, bits, rows), others)
        for dtype in (torch.float32, torch.bfloat16):
            ours = embedding_grouped(*words, width, **rest, dtype=dtype)
            assert_exact(ours, reference_embedding_grouped(*words, width, **rest, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(backend, dtype, width):
    words, rest = given(tables(width), 2)
    gamma, beta = normal(width, dtype=dtype, seed=8), normal(width, dtype=dtype, seed=9)
    ours = embedding_grouped(
        *words, width, **rest, norm_weight=gamma, norm_bias=beta, eps=1e-5, dtype=dtype
    )
    total = reference_embedding_grouped(*words, width, **rest)
    exact = F.layer_norm(total.double(), (width,), gamma.double(), beta.double(), 1e-5)
    native = F.layer_norm(total.to(dtype), (width,), gamma, beta, 1e-5)
    assert ours.dtype == dtype
    assert_close_to_native(ours, native, exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(5, 8), (3, 7), (1, 2), (0, 6)], ids=str)
def test_packing(bits, shape):
    table = normal(*shape) * 3
    if shape[0] > 1:
        table[1] = 0
    codes, scale = pack_table(table, bits)
    assert codes.shape == (shape[0], shape[1] if bits == 8 else -(-shape[1] // 2))
    back = unpack_table(codes, scale, shape[1])
    assert bool(((back - table).abs() <= 0.5001 * scale[:, None]).all())
    again = pack_table(back, bits)
    assert_exact(again[0], codes)


def test_packing_refuses():
    for table, bits in ((normal(3, 4), 6), (normal(4), 8), (torch.full((2, 2), torch.nan), 8)):
        with pytest.raises(ValueError, match=r"table: got .* need .* 4 or 8 bits"):
            pack_table(table, bits)


def test_ids_in_no_table(backend):
    ids, codes, scale = tables(16)[:3]
    ids[4], ids[7] = 50, -1
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="ids; got 50; need 0 to 49"):
            embedding_grouped(ids, codes, scale, 16)
        return
    ours = embedding_grouped(ids, codes, scale, 16)
    assert ours.isnan().any(1).nonzero().flatten().tolist() == [4, 7]


WORDS = (torch.zeros(3, dtype=torch.int64), torch.zeros(5, 8, dtype=torch.uint8), torch.ones(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3)}, "dtype of ids; got Float; need Long"),
        ({"codes": torch.zeros(5, 6, dtype=torch.uint8)}, r"codes; got \[5, 6\]"),
        ({"scale": torch.ones(4)}, "scale; got"),
        ({"position_ids": torch.zeros(3, dtype=torch.int64)}, "position_ids; got some of ids"),
        ({"norm_weight": torch.ones(8)}, "norm_weight and norm_bias; got one"),
        ({"dtype": torch.float64}, "dtype; got float64"),
    ],
)
def test_refuses(change, message):
    names = ("ids", "codes", "scale")
    with pytest.raises(RuntimeError, match=message):
        embedding_grouped(**(dict(zip(names, WORDS, strict=True)) | {"width": 8} | change))


def test_opcheck(backend):
    words, rest = given(tables(16), 2)
    torch.library.opcheck(
        calling.kernels().embedding_grouped.default,
        (*words, 16, *rest.values(), normal(16), normal(16)),
    )


def test_explains():
    text = str(explain("embedding_grouped", *WORDS, 8))
    assert "132 bytes" in text
    assert "60 bytes, 8 bits" in text
