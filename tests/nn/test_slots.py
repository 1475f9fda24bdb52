"""Layers whose slots are filled by modules of any kind, and encoders whose layers differ."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from binary_reference import CONFIG, FEW_BITS, SIZES, checkpoint
from filbert import PackedBatch, binarize, load_binary
from filbert.conversion.hugging_face.layers import read_encoder
from filbert.nn import (
    BinaryBert,
    EncoderLayer,
    FeedForward,
    PackedEncoder,
    PackedLinear,
    RowNorm,
    dense_layer,
    load_encoder,
)
from filbert.nn.file import file_parts
from models import build
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [7, 1, 0, 12]


def of_bits(scheme="bibert"):
    config = FEW_BITS if scheme == "binarybert" else CONFIG
    return binarize(checkpoint(scheme), config=config, check=False)


def dense(**settings):
    size = SIZES["hidden"]
    made = build(
        "bert", hidden_size=size, num_attention_heads=SIZES["heads"],
        intermediate_size=2 * size,
    )  # fmt: skip
    return dense_layer(read_encoder(made.encoder)[0][0], **settings)


def mixed(scheme="bibert"):
    """Dense, 1-bit, and one with 1-bit attention before a dense feed-forward part."""
    bits, floats = list(of_bits(scheme).encoder.layers), dense()
    half = EncoderLayer(
        bits[1].attention, bits[1].out, bits[1].attn_norm, floats.feed_forward, floats.ffn_norm
    )
    return PackedEncoder([dense(), bits[0], half, dense(split_query=True)]).eval()


def rows_of(batch):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch.num_rows, SIZES["hidden"], generator=generator)


@pytest.mark.parametrize("scheme", ["bibert", "bit", "binarybert"])
def test_layers_of_several_kinds_run_one_after_the_other(scheme):
    encoder, batch = mixed(scheme), PackedBatch.from_lengths(LENGTHS)
    rows = rows_of(batch)
    with torch.inference_mode():
        expected = rows
        for layer in encoder.layers:
            expected, after = layer(expected[: batch.num_rows], batch)
            assert after is batch
        expected = expected[: batch.num_rows]
        assert_exact(encoder.forward_packed(rows, batch), expected)
        first = encoder.forward_packed(rows, batch, "cls")
        torch.testing.assert_close(first, batch.pool(expected, "cls"), rtol=1e-5, atol=1e-5)
        assert (first[2] == 0).all()


def test_a_text_is_the_same_alone_and_in_any_batch():
    encoder, batch = mixed(), PackedBatch.from_lengths(LENGTHS)
    rows = rows_of(batch)
    with torch.inference_mode():
        among = encoder.forward_packed(rows, batch)
        alone = encoder.forward_packed(rows[8:], PackedBatch.from_lengths([12]))
    assert_exact(among[8:], alone)


@pytest.mark.parametrize("scheme", ["bibert", "bit", "binarybert"])
def test_they_are_saved_and_loaded(scheme, tmp_path):
    encoder, batch = mixed(scheme), PackedBatch.from_lengths(LENGTHS)
    path = tmp_path / "encoder.safetensors"
    encoder.save(path)
    loaded = load_encoder(path)
    rows = rows_of(batch)
    with torch.inference_mode():
        assert_exact(loaded.forward_packed(rows, batch), encoder.forward_packed(rows, batch))
    assert loaded.to_config() == encoder.to_config()
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert path.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_come_back_as_they_were(dtype, tmp_path):
    parts = read_encoder(build("bert", dtype=dtype).encoder)[0]
    encoder = PackedEncoder.from_parts(parts).eval()
    encoder.save(tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    x = torch.randn(2, 5, encoder.hidden_size).to(dtype)
    with torch.inference_mode():
        assert_exact(loaded(x), encoder(x))
    assert (loaded.model_dtype, loaded.compute_dtype) == (dtype, encoder.compute_dtype)
    for ours, theirs in zip(loaded.layers, encoder.layers, strict=True):
        for one, other in zip(ours.dense_weights(), theirs.dense_weights(), strict=True):
            assert_exact(one, other)


def test_a_model_of_bits_with_a_dense_layer(tmp_path):
    model = of_bits()
    layers = [dense(), *model.encoder.layers]
    whole = BinaryBert(
        model.embeddings, PackedEncoder(layers), model.pooler, model.classifier, about=model.about
    )
    whole.save(tmp_path / "model.safetensors")
    loaded = load_binary(tmp_path / "model.safetensors")
    ids = torch.arange(10).view(2, 5)
    with torch.inference_mode():
        for ours, theirs in zip(loaded(ids), whole(ids), strict=True):
            assert_exact(ours, theirs)
        assert not torch.equal(whole(ids)[0], model(ids)[0])


def test_what_a_layer_tells_of_its_weights():
    encoder = mixed()
    kept = [layer.keeps_weights() for layer in encoder.layers]
    assert kept == [[True] * 6, [False] * 6, [False] * 4 + [True] * 2, [True] * 6]
    for layer, keeps in zip(encoder.layers, kept, strict=True):
        assert [weight is not None for weight in layer.dense_weights()] == keeps
        for _, linear in layer.linears():
            assert linear.nbytes > 0
            assert linear.kernel
            assert linear.reason


def test_fillings_that_do_not_fit_are_refused_with_all_reasons():
    bits, floats = of_bits().encoder.layers[0], dense()
    size, norm = SIZES["hidden"], floats.attn_norm
    narrow = FeedForward(PackedLinear([torch.randn(8, 16)]), floats.feed_forward.down)
    with pytest.raises(ValueError, match=r"gives bits .* takes floats") as error:
        EncoderLayer(bits.attention, floats.out, norm, narrow, norm)
    assert f"up takes 16 features, need {size}" in str(error.value)
    assert "need 8" in str(error.value)
    with pytest.raises(ValueError, match="need one size and dtype"):
        PackedEncoder([])
    half = dense()
    half.out.compute_dtype = torch.bfloat16
    with pytest.raises(ValueError, match=r"torch.bfloat16, .*need one size and dtype"):
        PackedEncoder([dense(), half])
    own = FeedForward(floats.feed_forward.up, floats.feed_forward.down, torch.tanh)
    with pytest.raises(ValueError, match="activation: got tanh, the model's own"):
        PackedEncoder([EncoderLayer(floats.attention, floats.out, norm, own, norm)]).to_config()


def test_files_that_are_refused(tmp_path):
    path = str(tmp_path / "encoder.safetensors")
    tensors, metadata = file_parts(mixed())
    about = json.loads(metadata["filbert.encoder"])

    def saved(change=None, **more):
        changed = json.loads(json.dumps(about))
        if change is not None:
            change(changed["config"]["layers"])
        save_file({**tensors, **more}, path, {"filbert.encoder": json.dumps({**changed})})

    saved(lambda layers: layers[0]["out"].update(kind="ternary"))
    with pytest.raises(ValueError, match=r"try saving the model again|got kind 'ternary'"):
        load_encoder(path)
    saved(lambda layers: layers[0]["out"].pop("in_features"))
    with pytest.raises(ValueError, match="without 'in_features'"):
        load_encoder(path)
    name = "packed_layers.0.out.weight"
    saved(**{name: tensors[name][:1].clone()})
    with pytest.raises(ValueError, match=r"packed_layers.0.out.weight .got"):
        load_encoder(path)
    saved()
    with pytest.raises(ValueError, match=r"without filbert's metadata, need one that BinaryBert"):
        load_binary(path)
    assert load_file(path).keys() == tensors.keys()
    of_bits().save(path)
    with pytest.raises(ValueError, match=r"need one that PackedEncoder.save wrote; try filbert"):
        load_encoder(path)


def test_norms_are_those_of_the_module():
    norm = torch.nn.LayerNorm(4, eps=1e-3)
    ours = RowNorm.of(norm, torch.bfloat16)
    assert ours.eps == norm.eps
    assert ours.weight.dtype == ours.bias.dtype == torch.bfloat16


def test_rows_that_are_dropped_between_layers_leave_the_others_in_place():
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]])
    batch = PackedBatch.from_mask(mask)
    x = torch.randn(3, 5, 4)
    rows = batch.pack(x)
    kept = torch.tensor([True, False, True, True, False, True, True])
    after = batch.select(kept)
    assert after.cu_seqlens.tolist() == [0, 3, 3, 5]
    assert after.positions.tolist() == [0, 1, 2, 0, 1]
    assert after.max_seqlen == 3
    expected = torch.zeros_like(x)
    for b, s in ((0, 0), (0, 3), (0, 4), (2, 2), (2, 3)):
        expected[b, s] = x[b, s]
    assert_exact(after.unpack(rows[kept]), expected)
    twice = after.select(torch.tensor([False, True, True, False, False]))
    assert twice.cu_seqlens.tolist() == [0, 2, 2, 2]
    assert twice.indices.tolist() == [3, 4]
    none = batch.select(torch.zeros(7, dtype=torch.bool))
    assert none.num_rows == none.max_seqlen == 0
    for wrong in (kept[:-1], kept.long()):
        with pytest.raises(ValueError, match=r"kept: got .*need bool \[7\]"):
            batch.select(wrong)
