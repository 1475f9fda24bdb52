"""The modules of a binary model: attention, embedding, the model around them, and its file."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from binary_reference import (
    CONFIG,
    FEW_BITS,
    SIZES,
    above,
    batch,
    below,
    bi_attention,
    bibert_weight,
    bit_attention,
    bit_table,
    checkpoint,
)
from filbert import PackedBatch, load_binary
from filbert.compress.binarize.conversion import binarize
from filbert.nn import (
    BinaryAttention,
    BinaryBert,
    BinaryEmbedding,
    LinearBinary,
    MixedAttention,
    PackedEncoder,
    RowPacker,
)
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

SIGNS = {"below": below, "above": above, "exact": torch.sign}
HEADS, HIDDEN = SIZES["heads"], SIZES["hidden"]
MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 9, [0, 1] * 4 + [0], [1] + [0] * 8])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projections(ties, bias=True, seed=0):
    """Query, key and value; with bias 0, zeros are as common as can be."""
    return [
        LinearBinary.from_bits(
            random(HIDDEN, HIDDEN, seed=seed + i) > 0, torch.full((HIDDEN,), 0.25),
            random(HIDDEN, seed=seed + 10 + i) if bias else torch.zeros(HIDDEN),
            RowPacker.sign(HIDDEN, ties=ties),
        )
        for i in range(3)
    ]  # fmt: skip


def attended(layers, rows, packed, formula):
    """The context by the paper's formula, on the padded batch, as packed rows."""
    q, k, v = (packed.unpack(layer(rows).double()) for layer in layers)
    keep = packed.unpack(torch.ones(packed.num_rows, dtype=torch.float64))
    context = formula(q, k, v, (1.0 - keep[:, None, None, :]) * -10000.0)
    return context.flatten(0, 1)[packed.indices]


@pytest.mark.parametrize("score_ties", ["below", "above"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ties", SIGNS)
def test_bi_attention_is_its_formula(ties, bias, score_ties):
    """Also where query, key and value have zeros: signs of 0 kept."""
    layers, packed = projections(ties, bias), PackedBatch.from_mask(MASK)
    rows = random(packed.num_rows, HIDDEN, seed=20)
    into = RowPacker.sign(HIDDEN, ties=ties)
    attention = BinaryAttention(layers, HEADS, into, score_ties=score_ties)
    assert len(attention.layers) == 1  # one product for all three
    context = attended(
        layers, rows, packed,
        lambda q, k, v, mask: bi_attention(
            q, k, v, mask, HEADS, SIGNS[ties], choose_zeros=score_ties == "above"
        ),
    )  # fmt: skip
    assert (context == 0).any()
    assert_exact(attention(rows, packed).unpack(torch.float64), SIGNS[ties](context))
    assert attention.eager == (ties == "exact" and not bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ties", SIGNS)
def test_bit_attention_is_its_formula(ties, bias):
    """Thresholded softmax; the next layer's shift, 0 in some channels and not in others."""
    layers, packed = projections(ties, bias, seed=3), PackedBatch.from_mask(MASK)
    rows = random(packed.num_rows, HIDDEN, seed=20)
    shift = random(HIDDEN, seed=21) * 0.1
    shift[::3] = 0.0
    scales = {"query": 0.9, "key": 0.8, "value": 0.7, "attn": 0.21}
    attention = BinaryAttention(
        layers, HEADS, RowPacker.sign(HIDDEN, shift, ties),
        score_scale=0.9 * 0.8 / 32**0.5, prob_scale=0.21, value_scale=0.7,
    )  # fmt: skip
    context = attended(
        layers, rows, packed,
        lambda q, k, v, mask: bit_attention(q, k, v, mask, HEADS, SIGNS[ties], scales),
    )  # fmt: skip
    moved = context + shift.double()
    assert 0 < (moved == 0).float().mean() < 0.9
    assert_exact(attention(rows, packed).unpack(torch.float64), SIGNS[ties](moved))


def test_attention_of_different_inputs_is_three_products():
    layers = projections("below")
    layers[1].packer = RowPacker.sign(HIDDEN, torch.full((HIDDEN,), 0.1))
    attention = BinaryAttention(layers, HEADS, RowPacker.sign(HIDDEN))
    assert len(attention.layers) == 3
    packed = PackedBatch.full(2, 5)
    rows = random(10, HIDDEN)
    context = attended(
        layers, rows, packed, lambda q, k, v, mask: bi_attention(q, k, v, mask, HEADS, below)
    )
    assert_exact(attention(rows, packed).unpack(torch.float64), below(context))


def test_attention_refuses():
    layers = projections("below")
    for heads, into in ((4, HIDDEN), (2, 32)):
        with pytest.raises(ValueError, match="a multiple of 32 for each head"):
            BinaryAttention(layers, heads, RowPacker.sign(into))
    with pytest.raises(ValueError, match="score_ties: got 'exact'"):
        BinaryAttention(layers, 2, RowPacker.sign(HIDDEN), score_ties="exact")


@pytest.mark.parametrize("features", [1, 32, 70])
def test_embedding_is_its_formula(features):
    table, ids = random(11, features), torch.tensor([[3, 0, 3], [10, 5, 1]])
    table[0] = 0.0
    row = BinaryEmbedding.from_weight(table, centre="row")
    whole = BinaryEmbedding.from_weight(table, centre="tensor")
    if features > 1:  # one value alone is its own mean
        assert_exact(row(ids), bibert_weight(table)[ids] + 0.0)
    torch.testing.assert_close(whole(ids), bit_table(table)[ids])
    assert row.weight.numel() == 11 * -(-features // 32)


@pytest.fixture(scope="module")
def model():
    return binarize(checkpoint("bibert"), config=CONFIG, check=False)


def run(model, ids, mask=None, types=None):
    with torch.inference_mode():
        return model(ids, mask, types)


def test_padding_changes_nothing(model):
    """Neither how much there is, nor what it holds, nor where it lies but for positions."""
    ids, mask, types = batch()
    whole = run(model, ids, mask, types)
    other = torch.where(mask, ids, 7)
    again = run(model, other, mask, types)
    for ours, expected in zip(again, whole, strict=True):
        assert_exact(ours, expected)
    more = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    wider = run(model, *more, torch.nn.functional.pad(types, (0, 5)))
    assert_exact(wider.last_hidden_state[:, :11], whole.last_hidden_state)
    assert (whole.last_hidden_state[~mask] == 0).all()
    assert (whole.last_hidden_state[mask] != 0).any()


def test_a_text_alone_is_the_text_in_a_batch(model):
    ids, mask, types = batch()
    whole = run(model, ids, mask, types)
    for index, length in enumerate(mask.sum(1).tolist()):
        one = slice(index, index + 1)
        alone = run(model, ids[one, :length], None, types[one, :length])
        assert_exact(alone.last_hidden_state, whole.last_hidden_state[one, :length])
        assert_exact(alone.pooler_output, whole.pooler_output[one])
        torch.testing.assert_close(alone.logits, whole.logits[one])


def test_positions_are_places_in_the_padded_text(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.tensor([[0, 1, 1, 1]])
    left = run(model, ids, mask).last_hidden_state[0, 1:]
    right = run(model, ids[:, 1:]).last_hidden_state[0]
    assert not torch.equal(left, right)
    with torch.inference_mode():
        packed = PackedBatch.from_mask(mask)
        rows = model.embed(ids, packed)
        moved = model.embeddings(ids[0, 1:], torch.arange(1, 4), None)
    assert_exact(rows, moved)


def test_texts_without_tokens(model):
    out = run(model, torch.ones(5, 9, dtype=torch.long), MASK)
    assert (out.last_hidden_state[2] == 0).all()
    assert (out.pooler_output[2] == 0).all()
    assert (out.pooler_output[[0, 1, 3, 4]] != 0).any(1).all()
    assert run(model, torch.ones(0, 9, dtype=torch.long)).last_hidden_state.shape == (0, 9, HIDDEN)


def test_a_rounded_softmax_some_sequences_at_a_time(monkeypatch):
    """As for all at once, whatever the mask; a text alone is the text in a batch."""
    few = made("binarybert", {})
    ids = torch.arange(45).view(5, 9) % SIZES["vocab"]
    whole = run(few, ids, MASK)
    monkeypatch.setattr(MixedAttention, "SCORES_AT_A_TIME", 1)
    for ours, expected in zip(run(few, ids, MASK), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    alone = run(few, ids[1:2, :4]).last_hidden_state
    torch.testing.assert_close(alone, whole[0][1:2, :4], rtol=1e-5, atol=1e-5)
    assert (whole[0][2] == 0).all()
    assert whole[0].isfinite().all()


def test_encoder_by_itself(model):
    mask = batch()[1]
    x = random(4, 11, HIDDEN)
    with torch.inference_mode():
        got = model.encoder(x, mask)
        packed = PackedBatch.from_mask(mask)
        rows = x[mask]
        for layer in model.encoder.layers:
            rows, packed = layer(rows, packed)
    assert_exact(got[mask], rows)
    assert (got[~mask] == 0).all()
    assert isinstance(model.encoder, PackedEncoder)


def test_bfloat16_rows(model):
    ids, mask, types = batch()
    half = binarize(checkpoint("bibert"), config=CONFIG, check=False).bfloat16()
    assert_exact(half.pooler.alpha, model.pooler.alpha)
    out = run(half, ids, mask, types)
    assert out.last_hidden_state.dtype == torch.bfloat16
    # Layer by layer on equal inputs, and part by part, since bits flip within a layer as well.
    near = {"rtol": 2**-6, "atol": 2**-6}  # a few roundings of numbers up to 4
    with torch.inference_mode():
        packed = PackedBatch.from_mask(mask)
        rows = half.embed(ids, packed, types)
        torch.testing.assert_close(rows.float(), model.embed(ids, packed, types), **near)
        for mine, full in zip(half.encoder.layers, model.encoder.layers, strict=True):
            bits = mine.attention(rows, packed)
            assert_exact(bits.words, full.attention(rows.float(), packed).words)
            middle = mine.out(bits, residual=rows, norm=mine.attn_norm)
            expected = full.out(bits, residual=rows.float(), norm=full.attn_norm)
            torch.testing.assert_close(middle.float(), expected, **near)
            inner = mine.feed_forward.inner_of(middle)
            assert_exact(inner.words, full.feed_forward.inner_of(middle.float()).words)
            rows = mine.feed_forward.down(inner, residual=middle, norm=mine.ffn_norm)
            expected = full.feed_forward.down(inner, residual=middle.float(), norm=full.ffn_norm)
            torch.testing.assert_close(rows.float(), expected, **near)
        assert_exact(packed.unpack(rows), out.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_rows_are_refused(dtype):
    half = binarize(checkpoint("bibert"), config=CONFIG, check=False).to(dtype)
    with pytest.raises(ValueError, match=f"rows: got {dtype} on cpu, need torch.float32"):
        run(half, *batch())


def test_model_refuses(model):
    ids = torch.ones(2, 5, dtype=torch.long)
    for args, words in (
        ((ids[0],), "input_ids: got shape"),
        ((ids.repeat(1, 9),), "S at most 24"),
        ((ids, torch.ones(2, 4)), "attention_mask: got 4 places"),
        ((ids, None, ids[:, 1:]), "token_type_ids: got shape"),
    ):
        with pytest.raises(ValueError, match=words):
            run(model, *args)
    with pytest.raises(RuntimeError, match="the input requires a gradient"):
        model.encoder(random(1, 5, HIDDEN).requires_grad_())


def test_ids_that_no_table_has_are_refused(model):
    ids = torch.ones(2, 5, dtype=torch.long)
    assert_exact(run(model, ids.int(), None, ids.int())[0], run(model, ids, None, ids)[0])
    for bad in (-1, SIZES["vocab"]):
        with pytest.raises(IndexError):
            run(model, torch.full_like(ids, bad))
    for bad in (-1, 2):
        with pytest.raises(IndexError):
            run(model, ids, None, torch.full_like(ids, bad))
    with pytest.raises(IndexError), torch.inference_mode():
        model.embeddings(ids[0], torch.full((5,), -1), None)
    for dtype in (torch.uint8, torch.bool, torch.float32):
        with pytest.raises(ValueError, match=f"input_ids: got {dtype}, need int64 or int32"):
            run(model, ids.to(dtype))
        with pytest.raises(ValueError, match=f"token_type_ids: got {dtype}, need int64 or int32"):
            run(model, ids, None, ids.to(dtype))
    with pytest.raises(ValueError, match=r"ids: got torch.uint8, need"):
        model.embeddings.words[0](ids.to(torch.uint8))


def test_training_is_refused():
    model = binarize(checkpoint("bibert"), config=CONFIG, check=False)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(RuntimeError, match="training mode and gradients are recorded"):
        model.train()(ids)
    with torch.no_grad():
        model(ids)


CASES = [("bibert", {}), ("bibert", {"ties": "below"}), ("bibert", {"ties": "above"}),
         ("bit", {}), ("bit", {"ties": "below"}), ("binarybert", {"split": True})]  # fmt: skip


def made(scheme, options):
    options = dict(options)
    state = checkpoint(scheme, split=options.pop("split", False))
    config = FEW_BITS if scheme == "binarybert" else CONFIG
    return binarize(state, config=config, check=False, **options)


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_a_state_dict_gives_the_model_too(scheme, options):
    """Also into a live model, whose integer thresholds were of other biases and scales."""
    live, other = made(scheme, options), made(scheme, options)
    with torch.no_grad():
        for name, t in other.state_dict().items():
            if name.endswith(("bias", "threshold")) and t.ndim == 1:
                t += random(*t.shape, seed=5) * 0.3
            if name.endswith(("context_scale", "score_scale", "prob_half")):
                t *= 1.25
    other.load_state_dict(other.state_dict())
    ids, mask, types = batch()
    before = run(live, ids, mask, types)
    live.load_state_dict(other.state_dict())
    fresh = BinaryBert.from_config(other.to_config())
    fresh.load_state_dict(other.state_dict())
    expected = run(other, ids, mask, types)
    assert not torch.equal(before[0], expected[0])
    for loaded in (live, fresh):
        for ours, theirs in zip(run(loaded, ids, mask, types), expected, strict=True):
            assert_exact(ours, theirs)
        derived = dict(loaded.named_buffers())
        for name, t in other.named_buffers():
            assert_exact(derived[name], t)


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_pickle_and_deepcopy(scheme, options):
    before, file = made(scheme, options), io.BytesIO()
    torch.save(before, file)
    file.seek(0)
    expected = run(before, *batch())
    for after in (torch.load(file, weights_only=False), copy.deepcopy(before)):
        after.load_state_dict(before.state_dict())
        for ours, theirs in zip(run(after, *batch()), expected, strict=True):
            assert_exact(ours, theirs)


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_a_file_gives_the_model_back(scheme, options, tmp_path):
    before, path = made(scheme, options), tmp_path / "model.safetensors"
    before.save(path)
    after = load_binary(path)
    ids, mask, types = batch()
    for ours, expected in zip(run(after, ids, mask, types), run(before, ids, mask, types),
                              strict=True):  # fmt: skip
        assert_exact(ours, expected)
    assert after.about == before.about
    assert not after.training
    derived = dict(before.named_buffers())
    for name, t in after.named_buffers():  # thresholds too, which the file does not hold
        assert_exact(t, derived[name])
    assert any(name.endswith("totals") for name in set(derived) - set(before.state_dict()))
    again = tmp_path / "again.safetensors"
    after.save(again)
    assert path.read_bytes() == again.read_bytes()


def as_format_2(tensors, metadata):
    """What a file of format 2 held: layers of six parts, and linear layers without their kind."""
    about = json.loads(metadata["filbert.binary"])
    assert about["format"] == 3
    config = about["config"]

    def linear(new):
        if new["kind"] == "binary_sum":
            return {"terms": [linear(term) for term in new["terms"]]}
        return {name: value for name, value in new.items() if name != "kind"}

    layers = []
    for layer in config.pop("encoder")["layers"]:
        attention, inner = layer["attention"], layer.pop("feed_forward")
        attention["layers"] = [linear(side) for side in attention["layers"]]
        layers.append(
            {**layer, "out": linear(layer["out"]), "up": linear(inner["up"]),
             "down": linear(inner["down"]), "activation": inner["activation"]}
        )  # fmt: skip
    config["layers"], config["pooler"] = layers, linear(config["pooler"])

    def old(name):
        return name.replace("packed_layers", "layers").replace(".feed_forward.", ".")

    return {old(name): t for name, t in tensors.items()}, about


def test_files_of_earlier_formats(tmp_path):
    """Bits mean what they did; the softmax of few-bit models was not rounded then."""
    from filbert.nn.file import file_parts

    path = str(tmp_path / "model.safetensors")
    for scheme in ("bibert", "bit", "binarybert"):
        before = made(scheme, {})
        tensors, about = as_format_2(*file_parts(before))
        save_file(tensors, path, {"filbert.binary": json.dumps({**about, "format": 2})})
        for ours, theirs in zip(run(load_binary(path), *batch()), run(before, *batch()),
                                strict=True):  # fmt: skip
            assert_exact(ours, theirs)
        save_file(tensors, path, {"filbert.binary": json.dumps({**about, "format": 1})})
        if scheme == "binarybert":
            with pytest.raises(
                ValueError, match=r"got format 1 .*need format 3.*try filbert.binarize"
            ):
                load_binary(path)
        else:
            for ours, theirs in zip(run(load_binary(path), *batch()), run(before, *batch()),
                                    strict=True):  # fmt: skip
                assert_exact(ours, theirs)


def test_bfloat16_file(tmp_path):
    before = made("bibert", {}).bfloat16()
    before.save(tmp_path / "half.safetensors")
    after = load_binary(tmp_path / "half.safetensors")
    ids, mask, types = batch()
    assert_exact(run(after, ids, mask, types)[0], run(before, ids, mask, types)[0])


def test_a_fresh_process_reads_it_without_transformers(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    ids, mask, types = batch()
    expected = run(model, ids, mask, types)
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "sys.modules['transformers'] = None  # importing it would fail\n"
        "import torch, filbert\n"
        "torch.set_num_threads(1)\n"
        f"model = filbert.load_binary({str(tmp_path / 'model.safetensors')!r})\n"
        f"ids = torch.tensor({ids.tolist()}); mask = torch.tensor({mask.tolist()})\n"
        f"types = torch.tensor({types.tolist()})\n"
        "with torch.inference_mode(): out = model(ids, mask, types)\n"
        f"torch.save(list(out), {str(tmp_path / 'out.pt')!r})\n"
        "before = 'filbert.compress' in sys.modules\n"
        "print(before, callable(filbert.binarize), 'filbert.compress' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout == "False True True\n", result.stdout + result.stderr
    for ours, theirs in zip(torch.load(tmp_path / "out.pt"), expected, strict=True):
        assert_exact(ours, theirs)


def test_files_that_are_refused(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(OSError, match="No such file"):
        load_binary(tmp_path / "nothing.safetensors")
    save_file({"x": torch.ones(1)}, str(path))
    with pytest.raises(ValueError, match="without filbert's metadata"):
        load_binary(path)
    from filbert.nn.file import file_parts

    tensors, metadata = file_parts(model)
    about = json.loads(metadata["filbert.binary"])
    for change in ({"format": 4}, {"format": None}, {"layout": "bit 31 first"},
                   {"format": 1, "layout": "bit 31 first"}):  # fmt: skip
        save_file(tensors, str(path), {"filbert.binary": json.dumps({**about, **change})})
        with pytest.raises(ValueError, match="got format and layout"):
            load_binary(path)
    name = "encoder.packed_layers.1.feed_forward.up.weight"
    for wrong, words in (
        ({k: t for k, t in tensors.items() if k != name}, "got nothing"),
        ({**tensors, name: tensors[name][:1]}, "up.weight .got"),
        ({**tensors, name: tensors[name].float()}, "up.weight .got torch.float32"),
        ({**tensors, "more": torch.ones(1)}, "more .unknown"),
    ):
        save_file(wrong, str(path), metadata)
        with pytest.raises(ValueError, match=words):
            load_binary(path)
    assert isinstance(model, BinaryBert)
