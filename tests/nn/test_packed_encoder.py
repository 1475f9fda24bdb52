"""PackedEncoder by itself: rows in, rows out, and only the first row of each text if asked."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from filbert.conversion.hugging_face.layers import read_encoder
from filbert.nn import PackedEncoder
from filbert.packed.batch import PackedBatch
from models import FAMILIES, MASKS, build
from tolerances import assert_close_to_native, assert_exact

HIDDEN = 48


def original(family="bert", dtype=torch.float32):
    model = build(family, dtype=dtype, attention="eager")
    return model.transformer if family == "distilbert" else model.encoder


def packed(family="bert", dtype=torch.float32, **settings):
    parts, reasons = read_encoder(original(family, dtype).requires_grad_(False))
    assert not reasons
    return PackedEncoder.from_parts(parts, **settings).eval()


def hidden_states(mask, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*mask.shape, HIDDEN, generator=generator).to(dtype)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_rows_only(family, dtype, mask):
    """The pooled last layer gives what pooling all rows gives, also for texts without tokens."""
    encoder = packed(family, dtype)
    batch = PackedBatch.from_mask(MASKS[mask])
    rows = encoder.pack(hidden_states(MASKS[mask], dtype), batch)
    pooled = encoder.forward_packed(rows, batch, pooled="cls")
    every = batch.pool(encoder.forward_packed(rows, batch), "cls")
    eps = torch.finfo(encoder.compute_dtype).eps
    torch.testing.assert_close(pooled, every, rtol=8 * eps, atol=8 * eps)
    empty = MASKS[mask].sum(1) == 0
    assert_exact(pooled[empty], torch.zeros_like(pooled[empty]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fold_bias", [True, False])
def test_padded_input(dtype, fold_bias):
    mask = MASKS["right"]
    additive = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)
    additive = additive[:, None, None, :]
    x, plain = hidden_states(mask, dtype), original(dtype=dtype)
    with torch.inference_mode():
        native = plain(x, additive.to(dtype))[0]
        exact = copy.deepcopy(plain).double()(x.double(), additive.double())[0]
        ours = packed(dtype=dtype, fold_bias=fold_bias)(x, mask)
    assert ours.dtype == dtype
    assert_close_to_native(ours[mask.bool()], native[mask.bool()], exact[mask.bool()])


def test_rows_stay_float32_where_bfloat16_is_slow(monkeypatch):
    mask, x = MASKS["right"], hidden_states(MASKS["right"], torch.bfloat16)
    monkeypatch.setattr("filbert.nn.dense.linear._bf16_gemm", lambda: False)
    encoder = packed(dtype=torch.bfloat16)
    batch = PackedBatch.from_mask(mask)
    assert encoder.compute_dtype == encoder.pack(x, batch).dtype == torch.float32
    assert encoder(x, mask).dtype == encoder.model_dtype == torch.bfloat16
    for ours, plain in zip(encoder.layers, original(dtype=torch.bfloat16).layer, strict=True):
        assert_exact(ours.dense_weights()[3], plain.attention.output.dense.weight.detach())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copier):
    encoder, mask = packed(), MASKS["right"]
    x = hidden_states(mask)
    assert_exact(copier(encoder)(x, mask), encoder(x, mask))


def test_what_it_refuses():
    encoder, mask = packed(), MASKS["right"]
    batch = PackedBatch.from_mask(mask)
    rows = encoder.pack(hidden_states(mask), batch)
    for bad, words in (
        (rows[1:], "rows: got shape"),
        (rows[:, 1:], "rows: got shape"),
        (rows.bfloat16(), "rows: got torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=words):
            encoder.forward_packed(bad, batch)
    with pytest.raises(ValueError, match="pooled: got 'max'"):
        encoder.forward_packed(rows, batch, pooled="max")
    with pytest.raises(RuntimeError, match="inference only"):
        encoder.forward_packed(rows.requires_grad_(), batch)
    with pytest.raises(RuntimeError, match="training mode"):
        encoder.train()(hidden_states(mask), mask)
    with pytest.raises(RuntimeError, match="cannot be cast"):
        encoder.bfloat16()


def test_a_default_device_changes_nothing():
    """All runs on the devices of its operands, whatever torch.set_default_device says."""
    mask = MASKS["scattered"]
    x, plain = hidden_states(mask), original()
    expected = packed()(x, mask)
    plain.requires_grad_(False)
    with torch.device("meta"):
        parts, reasons = read_encoder(plain)
        encoder = PackedEncoder.from_parts(parts).eval()
        batch = PackedBatch.from_mask(mask)
        rows = encoder.pack(x, batch)
        ours = batch.unpack(encoder.forward_packed(rows, batch))
        pooled = [batch.pool(rows, kind) for kind in ("mean", "cls")]
        full = PackedBatch.from_mask(torch.ones_like(mask))
    assert not reasons
    assert_exact(ours, expected)
    assert {t.device.type for t in (*pooled, full.cu_seqlens, full.positions)} == {"cpu"}
