"""attn_lowrank against float64, and to the bit against linear_dense and attn_varlen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import LENGTHS, normal, offsets
from filbert import (
    attn_lowrank,
    attn_varlen,
    explain,
    linear_dense,
    pack_dense,
    pack_heads,
)  # fmt: skip
from filbert.ops._attn_lowrank import reference_attn_lowrank
from tolerances import assert_close_to_native, assert_exact

#: dtype of the latents, dtype of the factors
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]
pairs = pytest.mark.parametrize(("rows", "weights"), PAIRS, ids=str)


@pytest.fixture(params=[1, 2, 48])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """48 are more than there are heads and sequences: threads share queries then."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Side:
    """The factor of one of query, key and value, and where it reads."""

    def __init__(
        self, heads: int, dim: int, rank: int, begin: int, groups: int, weights: torch.dtype
    ) -> None:
        self.heads, self.dim, self.rank = heads, dim, rank
        self.begin, self.groups = begin, groups
        self.factor = (normal(heads * dim, rank, seed=rank + begin) * rank**-0.5).to(weights)

    def of_head(self, latent: Tensor, head: int) -> tuple[Tensor, Tensor]:
        """The latents and the factor of a head."""
        column = self.begin + head // (self.heads // self.groups) * self.rank
        rows = self.factor[head * self.dim : (head + 1) * self.dim]
        return latent[:, column : column + self.rank], rows


class Case:
    """Factors of all three, with biases."""

    def __init__(
        self, heads: int, dim: int, sides: list[tuple[int, int, int]], rows: torch.dtype,
        weights: torch.dtype,
    ) -> None:  # fmt: skip
        self.heads, self.dim = heads, dim
        self.sides = [Side(heads, dim, *side, weights) for side in sides]
        self.width = max(s.begin + s.groups * s.rank for s in self.sides)
        self.bias = normal(3 * heads * dim, seed=3, dtype=rows)

    def latent(self, count: int, dtype: torch.dtype) -> Tensor:
        return normal(count, self.width, seed=4, dtype=dtype)

    def arguments(self) -> dict[str, Any]:
        return {
            **{n: pack_heads(s.factor, self.heads)
               for n, s in zip(("query", "key", "value"), self.sides, strict=True)},
            "head_dim": self.dim, "ranks": [s.rank for s in self.sides],
            "begins": [s.begin for s in self.sides], "groups": [s.groups for s in self.sides],
            "scale": self.dim**-0.5, "bias": self.bias,
        }  # fmt: skip

    def one_after_the_other(self, latent: Tensor, cu: Tensor, longest: int, **more: Any) -> Tensor:
        made = []
        for side, biases in zip(self.sides, self.bias.view(3, self.heads, -1), strict=True):
            heads = []
            for head in range(self.heads):
                rows, factor = side.of_head(latent, head)
                heads.append(linear_dense(rows, pack_dense(factor), self.dim, biases[head]))
            made.append(torch.stack(heads, 1))
        return attn_varlen(*made, cu, cu, longest, longest, self.dim**-0.5, **more)[0]

    def in_dtype(self, latent: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
        made = []
        for side, biases in zip(self.sides, self.bias.view(3, self.heads, -1), strict=True):
            heads = []
            for head in range(self.heads):
                rows, factor = side.of_head(latent.to(dtype), head)
                heads.append(rows @ factor.to(dtype).T + biases[head].to(dtype))
            made.append(torch.stack(heads))
        parts = [t.split(lengths, 1) for t in made]
        outs = [
            torch.softmax(q @ k.mT * self.dim**-0.5, -1) @ v for q, k, v in zip(*parts, strict=True)
        ]
        whole = torch.cat(outs, 1) if outs else made[0]
        return whole.transpose(0, 1)


#: heads, D, and (rank, begin, groups) of query, key and value
CASES = {
    "joint": (4, 16, [(20, 0, 1)] * 3),
    "ranks_apart": (4, 32, [(1, 0, 1), (15, 1, 1), (17, 16, 1)]),
    "each_head": (3, 16, [(16, 0, 3), (16, 48, 3), (5, 96, 3)]),
    "groups": (4, 48, [(33, 0, 2), (16, 66, 4), (257, 130, 1)]),
    "odd_heads": (3, 20, [(31, 0, 1), (31, 31, 1), (3, 62, 3)]),
}
cases = pytest.mark.parametrize("case", list(CASES))


#: long sequences go the same way whatever the factors are
BATCHES = [
    *((case, "ragged") for case in CASES), ("joint", "no_sequences"), ("joint", "one_huge"),
    ("odd_heads", "key_block_edges"),
]  # fmt: skip


@pairs
@pytest.mark.parametrize(("case", "lengths"), BATCHES)
def test_is_the_products_and_attention(isa, threads, case, lengths, rows, weights):
    given = Case(*CASES[case], rows, weights)
    cu, longest = offsets(LENGTHS[lengths]), max(LENGTHS[lengths], default=0)
    count = int(cu[-1])
    latent = given.latent(count, rows)
    more = {"key_bias": normal(count, seed=9)}
    for some in ({}, more):
        ours = attn_lowrank(latent, cu_seqlens=cu, max_seqlen=longest, **given.arguments(), **some)
        assert_exact(ours, given.one_after_the_other(latent, cu, longest, **some))


@pairs
@cases
def test_is_close_to_float64(isa, case, rows, weights):
    given, lengths = Case(*CASES[case], rows, weights), [63, 1, 64, 2, 65]
    latent = given.latent(sum(lengths), rows)
    exact = given.in_dtype(latent, lengths, torch.float64)
    native = given.in_dtype(latent, lengths, rows)
    arguments = given.arguments()
    ours = attn_lowrank(latent, cu_seqlens=offsets(lengths), max_seqlen=65, **arguments)
    assert_close_to_native(ours, native, exact)
    order = ("query", "key", "value")
    meaning = reference_attn_lowrank(
        latent, *(arguments[n] for n in order), offsets(lengths), 65, given.dim,
        arguments["ranks"], arguments["begins"], arguments["groups"], arguments["scale"],
        given.bias,
    )  # fmt: skip
    assert_close_to_native(meaning, native, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(isa, threads, dtype):
    given, lengths = Case(*CASES["groups"], dtype, dtype), [5, 130, 0, 1, 64]
    latent, arguments = given.latent(200, dtype), given.arguments()
    whole = attn_lowrank(latent, cu_seqlens=offsets(lengths), max_seqlen=130, **arguments)
    first = 0
    for length in lengths:
        rows = latent[first : first + length]
        alone = attn_lowrank(rows, cu_seqlens=offsets([length]), max_seqlen=length, **arguments)
        assert_exact(whole[first : first + length], alone)
        first += length


def test_whatever_other_sequences_hold_stays_there(threads):
    """A tail that reads the next sequence would bring its NaN."""
    given, lengths = Case(*CASES["joint"], torch.float32, torch.float32), [37, 70, 9]
    latent, arguments = given.latent(116, torch.float32), given.arguments()
    cu = offsets(lengths)
    clean = attn_lowrank(latent, cu_seqlens=cu, max_seqlen=70, **arguments)
    latent[37:107] = torch.nan
    dirty = attn_lowrank(latent, cu_seqlens=cu, max_seqlen=70, **arguments)
    assert dirty[37:107].isnan().all()
    assert_exact(dirty[:37], clean[:37])
    assert_exact(dirty[107:], clean[107:])


def test_hidden_keys_and_rows_without_a_sequence(threads):
    """The first keys hidden, as with padding on the left, and all keys of a sequence."""
    given = Case(*CASES["joint"], torch.float32, torch.float32)
    latent, arguments, cu = given.latent(150, torch.float32), given.arguments(), offsets([100, 20])
    bias = torch.zeros(150)
    bias[:70] = bias[100:120] = -torch.inf
    ours = attn_lowrank(latent, cu_seqlens=cu, max_seqlen=100, key_bias=bias, **arguments)
    assert ours[100:].eq(0).all()
    assert ours[:100].isfinite().all()
    kept = given.in_dtype(latent[70:100], [30], torch.float64)
    native = given.in_dtype(latent[70:100], [30], torch.float32)
    assert_close_to_native(ours[70:100], native, kept)


@pairs
@pytest.mark.parametrize("rank", [1, 16, 19])
def test_a_smaller_rank_is_the_first_of_the_factors(isa, threads, rows, weights, rank):
    given = Case(*CASES["joint"], rows, weights)
    latent, cu = given.latent(90, rows)[:, :rank], offsets([40, 50])
    arguments = given.arguments() | {"ranks": [rank] * 3}
    ours = attn_lowrank(latent, cu_seqlens=cu, max_seqlen=50, **arguments)
    for name, side in zip(("query", "key", "value"), given.sides, strict=True):
        arguments[name] = pack_heads(side.factor[:, :rank], 4)
    assert_exact(ours, attn_lowrank(latent, cu_seqlens=cu, max_seqlen=50, **arguments))


def test_latents_with_strides():
    given = Case(*CASES["groups"], torch.float32, torch.float32)
    buffer = normal(240, given.width + 9)
    latent, cu = buffer[::2, 4 : 4 + given.width], offsets([50, 70])
    arguments = given.arguments()
    assert_exact(
        attn_lowrank(latent, cu_seqlens=cu, max_seqlen=70, **arguments),
        attn_lowrank(latent.contiguous(), cu_seqlens=cu, max_seqlen=70, **arguments),
    )


def test_factors_of_zeros_give_the_mean_of_the_biases():
    given = Case(*CASES["joint"], torch.float32, torch.float32)
    for side in given.sides:
        side.factor.zero_()
    latent = given.latent(64, torch.float32)
    ours = attn_lowrank(latent, cu_seqlens=offsets([64]), max_seqlen=64, **given.arguments())
    assert torch.allclose(ours, given.bias.view(3, 4, 16)[2].expand(64, 4, 16), atol=1e-6)


def test_packed_heads_are_the_packed_weight_where_panels_are_whole():
    weight = normal(96, 20)
    assert_exact(pack_heads(weight, 3).flatten(0, 1), pack_dense(weight))
    with pytest.raises(ValueError, match="need \\[H \\* D, R\\]"):
        pack_heads(weight, 5)


HIGH_WATER = """
import resource, torch
from filbert import attn_lowrank, pack_heads
torch.set_num_threads(2)
torch.manual_seed(0)
b = [pack_heads(torch.randn(1024, 32), 16) for _ in range(3)]
latent = torch.randn(64 * 256, 32)
cu = torch.arange(0, 64 * 256 + 1, 256, dtype=torch.int32)
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(count):
    rows = count * 256
    return attn_lowrank(latent[:rows], *b, cu[: count + 1], 256, 64, [32] * 3, 0.125)
out = run(4)
before = most()
out = run(64)
print((most() - before) * 1024 - out.numel() * 4)
"""


def test_memory_does_not_grow_with_the_rows():
    """Query, key and value of 16,384 rows would be 201 MB."""
    run = subprocess.run(
        [sys.executable, "-c", HIGH_WATER], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 4 << 20


def test_refuses_what_does_not_fit():
    given = Case(*CASES["groups"], torch.float32, torch.float32)
    latent, cu = given.latent(20, torch.float32), offsets([12, 8])
    good = {"cu_seqlens": cu, "max_seqlen": 12, **given.arguments()}
    for name, value, said in (
        ("query", good["query"].half(), "dtype of key"),
        ("value", good["value"][:, :2].contiguous(), "value; got"),
        ("ranks", [33, 16, 0], "rank of value; got 0"),
        ("ranks", [33, 16], "ranks; got 2; need three values"),
        ("groups", [3, 4, 1], "groups of query; got 3; need a divisor"),
        ("begins", [0, 66, 131], "first column of value; got 131"),
        ("begins", [-1, 66, 130], "first column of query; got -1"),
        ("head_dim", 257, "head dimension; got 257"),
        ("bias", normal(7), "bias; got"),
        ("key_bias", normal(19), "key_bias; got"),
        ("cu_seqlens", offsets([12, 9]), "cu_seqlens; got 21"),
    ):
        with pytest.raises(RuntimeError, match=rf"attn_lowrank: {said}"):
            attn_lowrank(latent, **good | {name: value})


def test_explains_itself():
    given = Case(*CASES["joint"], torch.float32, torch.float32)
    arguments = given.arguments()
    order = [arguments[n] for n in ("query", "key", "value")]
    facts = explain(
        "attn_lowrank", given.latent(20, torch.float32), *order, offsets([12, 8]), 12, 16, [20] * 3,
        [0] * 3, [1] * 3, 0.25,
    )  # fmt: skip
    assert f"{3 * 12 * 16 * 4:,} bytes for each thread" in str(facts)


def test_opcheck():
    given = Case(*CASES["joint"], torch.float32, torch.float32)
    arguments = given.arguments()
    order = [arguments[n] for n in ("query", "key", "value")]
    torch.library.opcheck(
        torch.ops.filbert.attn_lowrank.default,
        (given.latent(20, torch.float32), *order, offsets([12, 8]), 12, 16, [20] * 3, [0] * 3,
         [1] * 3, 0.25, given.bias),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
