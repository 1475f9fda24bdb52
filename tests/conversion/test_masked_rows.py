"""Rows outside the mask: zeros, or on demand what plain transformers computes there."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from filbert.conversion.hugging_face.layers import read_encoder
from filbert.conversion.in_place import convert, report
from filbert.conversion.pooling import embed
from filbert.nn import PackedEncoder
from filbert.packed.batch import PackedBatch
from filbert.plan import PackedEncoderConfig
from models import ATTENTIONS, MASKS, build, exactly, run, swapped, tokens
from tolerances import assert_close_to_native, assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

COMPUTE = PackedEncoderConfig(masked_rows="compute")
PADDED = ["right", "left", "scattered"]


@pytest.mark.parametrize("mask", PADDED)
@pytest.mark.parametrize(("family", "attention"), ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_what_transformers_computes(family, attention, mask, dtype):
    model = build(family, dtype=dtype, attention=attention)
    native, exact = run(model, MASKS[mask]), run(exactly(model), MASKS[mask])
    got = run(convert(model, COMPUTE), MASKS[mask])
    assert_close_to_native(got, native, exact)
    assert got[MASKS[mask] == 0].abs().min(-1).values.max() > 0


def test_every_hidden_state():
    model, mask = build("bert"), MASKS["scattered"]

    def ask(model):
        with torch.inference_mode():
            states = model(tokens(mask), attention_mask=mask, output_hidden_states=True)
        return states.hidden_states

    native, exact = ask(model), ask(exactly(model))
    for triple in zip(ask(convert(model, COMPUTE)), native, exact, strict=True):
        assert_close_to_native(*triple)


@pytest.mark.parametrize("mask", MASKS)
def test_kept_rows_are_the_same_and_so_is_what_is_pooled(mask):
    zero, compute = convert(build("bert")), convert(build("bert"), COMPUTE)
    keep = MASKS[mask].bool()
    a, b = run(zero, MASKS[mask]), run(compute, MASKS[mask])
    torch.testing.assert_close(b[keep], a[keep], rtol=1e-5, atol=1e-5)
    assert_exact(a[~keep], torch.zeros_like(a[~keep]))
    assert b.isfinite().all()
    for pooling in ("mean", "cls"):
        pooled = [embed(m, tokens(keep), keep, pooling) for m in (zero, compute)]
        assert_exact(*pooled)


def test_what_it_says():
    for config, words in ((PackedEncoderConfig(), "zeros"), (COMPUTE, "computed")):
        model = convert(build("bert"), config)
        (head,) = [row for row in report(model) if row.now == "SwappedEncoder"]
        assert f"rows outside the mask: {words}" in head.reason
        assert swapped(copy.deepcopy(model)).masked_rows == config.masked_rows


def test_the_setting():
    data = json.loads(json.dumps(COMPUTE.to_dict()))
    assert PackedEncoderConfig.from_dict(data) == COMPUTE
    older = {"version": 1, "fold_bias": True, "check": True}
    assert PackedEncoderConfig.from_dict(older).masked_rows == "zero"
    parts = read_encoder(build("bert").encoder)[0]
    for make in (
        lambda: PackedEncoderConfig(masked_rows="computed"),
        lambda: PackedEncoderConfig.from_dict({**data, "masked_rows": True}),
        lambda: PackedEncoder.from_parts(parts, masked_rows="some"),
    ):
        with pytest.raises(ValueError, match=r"masked_rows.*need one of"):
            make()


def test_a_packed_encoder_by_itself():
    model, mask = build("bert").requires_grad_(False), MASKS["left"]
    parts = read_encoder(model.encoder)[0]
    x = torch.randn(*mask.shape, 48)
    zero, compute = (
        PackedEncoder.from_parts(parts).eval(),
        PackedEncoder.from_parts(parts, masked_rows="compute").eval(),
    )
    a, b = zero(x, mask), compute(x, mask)
    keep = mask.bool()
    torch.testing.assert_close(b[keep], a[keep], rtol=1e-5, atol=1e-5)
    assert b[~keep].abs().sum() > 0
    batch = compute.read_mask(x, mask)
    assert batch.num_rows == mask.numel()
    rows = compute.forward_packed(compute.pack(x, batch), batch, pooled="cls")
    torch.testing.assert_close(rows, b[:, 0], rtol=1e-5, atol=1e-5)


def test_what_padding_sees_matters_only_where_it_is_computed():
    keep = MASKS["right"].bool()
    mask = (keep[:, None, None, :] & keep[:, None, :, None]).clone()
    hidden = torch.zeros(3, 9, 48)
    with torch.no_grad():
        swapped(convert(build("bert")))(hidden, mask)
        encoder = swapped(convert(build("bert"), COMPUTE))
        with pytest.raises(ValueError, match="different keys"):
            encoder(hidden, mask)


def test_a_batch_of_every_row():
    batch = PackedBatch.from_mask(MASKS["right"])
    every = batch.keeping_every_row().to("cpu")
    assert_exact(every.key_bias == 0, MASKS["right"].bool().flatten())
    assert every.num_rows == MASKS["right"].numel()
    full = PackedBatch.from_mask(MASKS["none"])
    assert full.keeping_every_row() is full
    assert full.key_bias is None
