"""attn_binary against attention over ±1 in float64, and softmax taken by PyTorch."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from bit_rows import bit_rows, integers
from cases import LENGTHS, offsets
from filbert import _load, ops
from filbert.ops._attn_binary import reference_attn_binary
from filbert.ops.shared import calling
from filbert.ops.shared.words import words_to_bits, words_to_codes
from once import once
from tolerances import assert_exact

DIMS = [32, 64, 96, 128]
TIES = ["below", "above", "exact"]


def operands(lengths, heads, dim, orphans=2):
    rows = sum(lengths) + orphans  # the last rows belong to no sequence
    return [bit_rows(rows, heads * dim, seed=s) for s in (1, 2, 3)]


def signs(words, heads, dim):
    return 2 * words_to_bits(words, heads * dim).unflatten(1, (heads, dim)).double() - 1


def compare(context, threshold, ties):
    context = context.flatten(1)
    if ties == "exact":
        return (context > threshold).long() + (context >= threshold).long()
    return ((context > threshold) if ties == "below" else (context >= threshold)).long()


def check(got, context, covered, threshold, ties, width):
    codes = compare(context, threshold, ties)
    codes[covered:] = 0
    words, sums = got
    assert words.shape == (2 if ties == "exact" else 1, context.shape[0], width // 32)
    assert_exact(words_to_codes(words, width), codes)
    assert_exact(sums, codes.sum(1).to(torch.int32))


@once
def attend(lengths, q, k, v, choose):
    """Context of every sequence by dense products; ``choose`` maps scores to 0 and 1."""
    context = torch.zeros_like(q)
    begin = 0
    for length in lengths:
        span = slice(begin, begin + length)
        qs, ks, vs = (t[span].transpose(0, 1) for t in (q, k, v))
        if length:
            context[span] = (choose(qs @ ks.transpose(1, 2)) @ vs).transpose(0, 1)
        begin += length
    return context


def positive(scores, ties):
    return ((scores >= 0) if ties == "above" else (scores > 0)).double()


def heavy(scores, scale, half):
    """A probability within 1e-9 of ``half`` may go either way; none of these is."""
    p = torch.softmax(scale * scores, -1)
    assert (p - half).abs().min() > 1e-9
    return (p > half).double()


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("ties", TIES)
def test_boolean_attention(backend, name, dim, ties):
    lengths, heads = LENGTHS[name], 2
    if backend == "hostcuda" and name in ("one_huge", "key_block_edges") and dim in (32, 96):
        lengths = [min(n, 200) for n in lengths]  # the long ones once for each kind of head
    q, k, v = operands(lengths, heads, dim)
    threshold = integers(-3, 4, heads * dim, seed=4).int()
    score_ties = "above" if ties == "exact" else "below"
    got = ops.attn_binary(
        q, k, v, offsets(lengths), max([0, *lengths]), heads, dim,
        threshold=threshold, ties=ties, score_ties=score_ties,
    )  # fmt: skip
    choose = functools.partial(positive, ties=score_ties)
    context = attend(lengths, *(signs(t, heads, dim) for t in (q, k, v)), choose)
    check(got, context, sum(lengths), threshold, ties, heads * dim)


@pytest.mark.parametrize("name", ["single", "ragged", "key_block_edges"])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("half", [0.001, 0.02, 0.25])
def test_thresholded_softmax(backend, name, dim, half):
    lengths, heads, scale = LENGTHS[name], 2, 0.9 / math.sqrt(dim)
    q, k, v = operands(lengths, heads, dim)
    got = ops.attn_binary(
        q, k, v, offsets(lengths), max(lengths), heads, dim,
        table=ops.softmax_table(scale, dim), half=half,
    )  # fmt: skip

    choose = functools.partial(heavy, scale=scale, half=half)
    context = attend(lengths, *(signs(t, heads, dim) for t in (q, k, v)), choose)
    check(got, context, sum(lengths), 0, "below", heads * dim)


@pytest.mark.parametrize("ties", TIES)
def test_all_scores_tie(backend, ties):
    """Orthogonal queries and keys: every score is 0, so the policies are all that decides."""
    heads, dim, length = 1, 64, 40
    q = torch.full((length, 2), -1, dtype=torch.int32)
    k = torch.tensor([-1, 0], dtype=torch.int32).expand(length, 2)
    v = bit_rows(length, dim)
    cu = offsets([length])
    none, _ = ops.attn_binary(q, k, v, cu, length, heads, dim, ties=ties)
    context = torch.zeros(length, dim, dtype=torch.float64)
    assert_exact(words_to_codes(none, dim), compare(context, 0, ties))
    every, _ = ops.attn_binary(q, k, v, cu, length, heads, dim, ties=ties, score_ties="above")
    context[:] = signs(v, heads, dim).sum(0)
    assert_exact(words_to_codes(every, dim), compare(context, 0, ties))


@pytest.mark.every_order
def test_neighbours_do_not_matter(backend):
    """A sequence has the same bits alone, in a batch, and whatever the other rows hold."""
    lengths, heads, dim = [19, 70, 33], 2, 64
    q, k, v = operands(lengths, heads, dim)
    table = ops.softmax_table(0.1, dim)
    for more in ({}, {"table": table, "half": 0.01}):
        words, _ = ops.attn_binary(q, k, v, offsets(lengths), 70, heads, dim, **more)
        span = slice(19, 89)
        alone, _ = ops.attn_binary(
            *(t[span].contiguous() for t in (q, k, v)), offsets([70]), 70, heads, dim, **more
        )
        assert_exact(alone[0], words[0, span])
        others = [t.clone() for t in (q, k, v)]
        for t in others:
            t[:19] = -1
            t[89:] = 0x55555555
        changed, _ = ops.attn_binary(*others, offsets(lengths), 70, heads, dim, **more)
        assert_exact(changed[0, span], words[0, span])


@pytest.mark.parametrize("longest", [0, 1, 50, 51, 2**31 - 1, 2**40, 2**63 - 1])
def test_the_longest_is_a_hint(backend, longest):
    lengths, heads, dim = [50, 3], 2, 64
    q, k, v = operands(lengths, heads, dim)
    got = ops.attn_binary(q, k, v, offsets(lengths), longest, heads, dim)
    expected = reference_attn_binary(q, k, v, offsets(lengths), heads, dim)
    assert_exact(got[0], expected[0])
    assert_exact(got[1], expected[1])


def test_thresholds_beyond_reach(backend):
    q, k, v = operands([40], 1, 64, orphans=0)
    for value, bit in ((-(2**31), 1), (2**31 - 1, 0)):
        threshold = torch.full((64,), value, dtype=torch.int32)
        words, sums = ops.attn_binary(q, k, v, offsets([40]), 40, 1, 64, threshold=threshold)
        assert_exact(words_to_codes(words, 64), torch.full((40, 64), bit))
        assert sums.tolist() == [64 * bit] * 40


def test_views_of_one_buffer(backend):
    heads, dim, length = 3, 64, 50
    qkv = bit_rows(length, 3 * heads * dim)
    parts = qkv.split(heads * dim // 32, dim=1)
    cu = offsets([length])
    got = ops.attn_binary(*parts, cu, length, heads, dim)
    expected = ops.attn_binary(*(p.contiguous() for p in parts), cu, length, heads, dim)
    assert_exact(got[0], expected[0])
    assert_exact(got[1], expected[1])


def test_threads_do_not_change_bits(threads):
    lengths, heads, dim = [100, 5, 300], 4, 64
    q, k, v = operands(lengths, heads, dim, orphans=0)
    got = ops.attn_binary(q, k, v, offsets(lengths), 300, heads, dim)
    context = attend(
        lengths, *(signs(t, heads, dim) for t in (q, k, v)), lambda s: (s > 0).double()
    )
    check(got, context, sum(lengths), 0, "below", heads * dim)


def test_softmax_table():
    table = ops.softmax_table(0.25, 64)
    assert table.shape == (65,)
    assert table.dtype == torch.int64
    assert table[0] == 2**40
    assert (table.diff() <= 0).all()
    exact = torch.exp(-0.5 * torch.arange(65, dtype=torch.float64))
    assert (table.double() / 2.0**40 - exact).abs().max() < 2.0**-40
    assert ops.softmax_table(1e308, 64).tolist() == [2**40] + [0] * 64
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite positive"):
            ops.softmax_table(scale, 64)


Q = torch.zeros(4, 4, dtype=torch.int32)
CU = offsets([4])
REFUSALS = {
    "dtype": ((Q.long(), Q, Q, CU, 4, 2, 64), {}, "Int"),
    "width": ((Q, Q[:, :3], Q, CU, 4, 2, 64), {}, r"\[T, H \* D / 32\]"),
    "rows": ((Q, Q[:3], Q, CU, 4, 2, 64), {}, r"\[T, H \* D / 32\]"),
    "too_many_rows": ((Q[:1].expand(2**31, -1), Q, Q, CU, 4, 2, 64), {}, r"fewer than 2\^31"),
    "heads": ((Q[:, :0], Q[:, :0], Q[:, :0], CU, 4, 2**59, 32), {}, "1 to 65536"),
    "wrapping_heads": ((Q, Q, Q, CU, 4, 2**59 + 2, 64), {}, "1 to 65536"),
    "head_dim": ((Q, Q, Q, CU, 4, 2, 48), {}, "multiple of 32"),
    "large_head": ((Q, Q, Q, CU, 4, 1, 160), {}, "up to 128"),
    "offsets": ((Q, Q, Q, offsets([5]), 4, 2, 64), {}, "within the packed rows"),
    "falling": ((Q, Q, Q, torch.tensor([0, 3, 2]).int(), 4, 2, 64), {}, "never fall"),
    "threshold": ((Q, Q, Q, CU, 4, 2, 64), {"threshold": torch.zeros(3).int()}, "vector"),
    "table": ((Q, Q, Q, CU, 4, 2, 64), {"table": torch.zeros(64).long()}, "vector"),
    "score_ties": ((Q, Q, Q, CU, 4, 2, 64), {"score_ties": "exact"}, "'below' or 'above'"),
    "device": ((Q, Q.to("meta"), Q, CU, 4, 2, 64), {}, "got meta"),
}


@pytest.mark.parametrize(("args", "more", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(args, more, message):
    with pytest.raises(RuntimeError, match=message):
        ops.attn_binary(*args, **more)


@pytest.mark.any_isa
def test_opcheck(backend):
    q, k, v = operands([5, 3], 2, 32)
    args = (q, k, v, offsets([5, 3]), 5, 2, 32)
    kernel = calling.kernels().attn_binary.default
    torch.library.opcheck(kernel, args)
    table = ops.softmax_table(0.1, 32)
    threshold = torch.zeros(64, dtype=torch.int32)
    torch.library.opcheck(kernel, (*args, threshold, "exact", "above", table, 0.1))


def test_plan_on_a_gpu():
    plan = _load.C.plan_attn_binary_cuda(
        rows=1000, sequences=16, max_seqlen=2**62, heads=12, dim=64, table=True
    )
    assert plan["blocks"] == 17 * -(-1000 // plan["rows_per_block"])
    assert plan["threads"] == 32 * plan["heads_at_once"]
    assert 12 % plan["heads_at_once"] == 0
    assert plan["shared_bytes"] <= 99 * 1024
    with pytest.raises(ValueError, match="a head"):
        _load.C.plan_attn_binary_cuda(1, 1, 1, 0, 64, False)
