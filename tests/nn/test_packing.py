"""PackedBatch against the plain meaning of a mask, and every mask it must refuse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from filbert.packed.batch import PackedBatch
from models import MASKS
from tolerances import assert_close_to_native, assert_exact

LOWEST = torch.finfo(torch.float32).min


def check(batch: PackedBatch, keep: torch.Tensor) -> None:
    """Every field against a loop over ``keep`` ``[B, S]`` bool."""
    batch_size, seq_len = keep.shape
    rows, ends, positions = [], [0], []
    for b in range(batch_size):
        kept = [s for s in range(seq_len) if keep[b, s]]
        rows += [b * seq_len + s for s in kept]
        positions += range(len(kept))
        ends.append(len(rows))
    assert_exact(batch.indices, torch.tensor(rows, dtype=torch.int64))
    assert_exact(batch.cu_seqlens, torch.tensor(ends, dtype=torch.int32))
    assert_exact(batch.positions, torch.tensor(positions, dtype=torch.int64))
    lengths = [b - a for a, b in pairwise(ends)]
    assert batch.max_seqlen == max(lengths, default=0)
    assert batch.lengths.tolist() == lengths
    assert (batch.batch_size, batch.seq_len) == (batch_size, seq_len)
    assert batch.num_rows == len(rows)
    share = 1 - len(rows) / keep.numel() if keep.numel() else 0
    assert batch.padding_share == pytest.approx(share)
    first = [a for a, n in zip(ends, lengths, strict=False) if n]
    assert_exact(batch.starts[batch.starts >= 0], torch.tensor(first, dtype=torch.int64))
    assert_exact(batch.starts < 0, batch.lengths == 0)
    assert_exact(batch.places[batch.indices], torch.arange(batch.num_rows))
    assert int((batch.places >= 0).sum()) == batch.num_rows


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32]
)
def test_2d_mask(name, dtype):
    mask = MASKS[name]
    check(PackedBatch.from_mask(mask.to(dtype)), mask.bool())


def test_2d_mask_keeps_every_nonzero():
    mask = torch.tensor([[2, 0, 7], [0, 0, 1]])
    check(PackedBatch.from_mask(mask), mask != 0)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("form", ["one row", "stride 0", "written out"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_4d_mask(name, heads, form, dtype):
    keep = MASKS[name].bool()
    mask = keep[:, None, None, :]
    if dtype != torch.bool:
        drop = torch.finfo(dtype).min
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, drop)
    queries = 1 if form == "one row" else keep.shape[1]
    mask = mask.expand(-1, heads, queries, -1)
    if form == "written out":
        mask = mask.clone()
    check(PackedBatch.from_mask(mask), keep)


@pytest.mark.parametrize("drop", [float("-inf"), -1e4, LOWEST])
def test_additive_drop_values(drop):
    keep = MASKS["right"].bool()
    mask = torch.zeros(keep.shape).masked_fill(~keep, drop)[:, None, None, :]
    check(PackedBatch.from_mask(mask), keep)


def test_4d_mask_that_also_hides_the_queries_of_padding():
    keep = MASKS["scattered"].bool()
    mask = (keep[:, None, None, :] & keep[:, None, :, None]).clone()
    check(PackedBatch.from_mask(mask), keep)


def test_4d_mask_for_the_whole_batch():
    mask = torch.tensor([True, True, False])[None, None, None, :]
    check(PackedBatch.from_mask(mask, batch_size=2), torch.tensor([[True, True, False]] * 2))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(4, 4).tril().bool()[None, None], ValueError, "different keys"),
        (torch.zeros(1, 1, 4, 4).masked_fill(torch.eye(4) == 0, LOWEST), ValueError, "different"),
        (torch.tensor([[[[True, False]], [[False, True]]]]), ValueError, "different keys"),
        (torch.tensor([[[[0.0, -1.5]]]]), ValueError, "bias"),
        (torch.tensor([[[[0.0, float("nan")]]]]), ValueError, "bias"),
        (torch.tensor([[[[0.0, 1.0]]]]), ValueError, "bias"),
        (torch.ones(2, 1, 1, 4, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(2, 1, 3, 4, dtype=torch.bool), ValueError, "as many queries as keys"),
        (torch.tensor([[0.0, LOWEST]]), ValueError, "negative"),
        (torch.ones(4), ValueError, "got shape"),
        (torch.ones(2, 3, 4), ValueError, "got shape"),
        (None, TypeError, "NoneType"),
    ],
)  # fmt: skip
def test_masks_that_are_refused(mask, error, words):
    with pytest.raises(error, match=words):
        PackedBatch.from_mask(mask)


def test_batch_size_that_does_not_fit():
    with pytest.raises(ValueError, match="got 3 sequences"):
        PackedBatch.from_mask(MASKS["none"], batch_size=4)


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [0, 0], [4, 4], [], [7]])
@pytest.mark.parametrize("spare", [None, 0, 2])
def test_from_lengths(lengths, spare):
    width = max(lengths, default=0)
    seq_len = None if spare is None else width + spare
    keep = torch.arange(seq_len or width)[None, :] < torch.tensor(lengths).view(-1, 1)
    check(PackedBatch.from_lengths(lengths, seq_len), keep)
    as_tensor = torch.tensor(lengths, dtype=torch.int32)
    check(PackedBatch.from_lengths(as_tensor, seq_len), keep)


@pytest.mark.parametrize(
    ("lengths", "seq_len"),
    [([3, -1], None), ([3, 5], 4), ([1.5], None), ([[1]], None), ([True], 4)],
)
def test_lengths_that_are_refused(lengths, seq_len):
    with pytest.raises(ValueError, match="lengths: got"):
        PackedBatch.from_lengths(lengths, seq_len)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_pack(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    batch = PackedBatch.from_mask(mask)
    check(batch, mask)
    x = torch.zeros(*shape, 4)
    assert batch.pack(x).shape == (0, 4)
    assert batch.unpack(batch.pack(x)).shape == x.shape
    for pooling in ("mean", "cls"):
        assert_exact(batch.pool(batch.pack(x), pooling), torch.zeros(shape[0], 4))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("inner", [(), (6,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_pack_and_unpack(name, inner, dtype):
    keep = MASKS[name].bool()
    batch = PackedBatch.from_mask(keep)
    x = (torch.randn(*keep.shape, *inner) * 100).to(dtype)
    rows = batch.pack(x)
    assert_exact(rows, x[keep])
    back = batch.unpack(rows)
    expected = torch.where(
        keep.view(*keep.shape, *[1] * len(inner)), x, torch.zeros((), dtype=dtype)
    )
    assert_exact(back, expected)


def test_packing_copies_only_when_something_is_padded():
    x = torch.randn(3, 9, 4)
    full = PackedBatch.from_mask(MASKS["none"])
    assert full.pack(x).data_ptr() == x.data_ptr()
    assert full.unpack(full.pack(x)).data_ptr() == x.data_ptr()
    padded = PackedBatch.from_mask(MASKS["right"])
    assert padded.pack(x).data_ptr() != x.data_ptr()


def test_padding_is_never_read():
    keep = MASKS["empty"].bool()
    x = torch.randn(*keep.shape, 4).masked_fill(~keep[..., None], float("nan"))
    batch = PackedBatch.from_mask(keep)
    rows = batch.pack(x)
    for result in (rows, batch.unpack(rows), batch.pool(rows), batch.pool(rows, "cls")):
        assert result.isfinite().all()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pool(name, dtype):
    keep = MASKS[name].bool()
    batch = PackedBatch.from_mask(keep)
    x = torch.randn(*keep.shape, 5).to(dtype)
    got = batch.pool(batch.pack(x), "mean")
    weight = keep[..., None]
    count = weight.sum(1).clamp(min=1)
    exact = (x.double() * weight).sum(1) / count
    assert got.dtype == dtype
    assert_close_to_native(got, (x * weight).sum(1) / count, exact)
    first = torch.stack([r[k][0] if k.any() else torch.zeros(5, dtype=dtype)
                         for r, k in zip(x, keep, strict=True)])  # fmt: skip
    assert_exact(batch.pool(batch.pack(x), "cls"), first)


def test_bad_rows_and_shapes():
    batch = PackedBatch.from_mask(MASKS["right"])
    with pytest.raises(ValueError, match="need \\[3, 9"):
        batch.pack(torch.zeros(3, 8, 4))
    for call in (batch.unpack, batch.pool):
        with pytest.raises(ValueError, match="packed rows"):
            call(torch.zeros(batch.num_rows + 1, 4))
    with pytest.raises(ValueError, match="'max'"):
        batch.pool(torch.zeros(batch.num_rows, 4), "max")


def test_to_moves_every_tensor():
    moved = PackedBatch.from_mask(MASKS["right"]).to("meta")
    assert {t.device.type for t in (moved.indices, moved.cu_seqlens, moved.positions)} == {"meta"}
    assert moved.num_rows == int(MASKS["right"].sum())


def test_rows_may_have_any_strides():
    batch = PackedBatch.from_lengths([3, 1, 4], 5)
    wide = torch.arange(3 * 5 * 8, dtype=torch.float32).view(3, 5, 8)
    for x in (
        wide[..., ::2],
        wide[..., :1].expand(-1, -1, 4),
        wide.transpose(0, 1).transpose(0, 1),
    ):
        packed = batch.pack(x)
        assert_exact(packed, x.flatten(0, 1)[batch.indices])
        assert_exact(batch.unpack(packed), x * (batch.places >= 0).view(3, 5, 1))
