"""What ``filbert.binarize`` makes of the settings of published codes: read right, or refused."""

from __future__ import annotations

import pytest
import torch

import filbert
from binarize_cases import refused
from binary_reference import CONFIG, FEW_BITS, SIZES, Reference, batch, checkpoint
from models import build

pytestmark = pytest.mark.usefixtures("one_thread")

#: as the training scripts write them
BIBERT = {**CONFIG, "quantize_act": True, "weight_bits": 1, "embedding_bits": 1, "input_bits": 1,
          "clip_val": 2.5, "hidden_act": "gelu", "layer_norm_eps": 1e-12}  # fmt: skip
BIT = {**CONFIG, "weight_bits": 1, "input_bits": 1, "weight_quant_method": "bwn",
       "input_quant_method": "elastic", "clip_init_val": 2.5, "learnable_scaling": True,
       "sym_quant_qkvo": True, "sym_quant_ffn_attn": False, "embed_layerwise": False,
       "weight_layerwise": True, "input_layerwise": True, "hidden_act": "relu",
       "not_quantize_attention": False}  # fmt: skip
LSQ = {**FEW_BITS, "weight_bits": 1, "weight_quant_method": "bwn", "input_quant_method": "lsq",
       "clip_init_val": 2.5, "learnable_scaling": True, "sym_quant_qkvo": True,
       "embed_layerwise": False, "input_layerwise": True, "hidden_act": "gelu"}  # fmt: skip
PUBLISHED = {"bibert": BIBERT, "bit": BIT, "binarybert": LSQ}
SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 80, "vocab_size": 53,
         "max_position_embeddings": 24, "type_vocab_size": 2}  # fmt: skip


def outputs(model):
    ids, mask, types = batch(3)
    with torch.inference_mode():
        return model(ids, mask, types).last_hidden_state[mask]


def meant(*args, **more):
    ids, mask, types = batch(3)
    return Reference(*args, **more)(ids, mask, types)[0][mask].float()


@pytest.mark.parametrize("scheme", PUBLISHED)
def test_published_configs_are_read(scheme):
    state = checkpoint(scheme)
    config = {**PUBLISHED[scheme], **SHAPE, "hidden_dropout_prob": 0.1, "initializer_range": 0.02}
    model = filbert.binarize(state, config=config)
    at = 5e-2 if scheme == "binarybert" else 2e-5  # a code halfway between two
    torch.testing.assert_close(outputs(model), meant(state, scheme), rtol=at, atol=at)
    assert len(model.report.notes) == 1  # what the classifier is taken for


@pytest.mark.parametrize(
    ("scheme", "change"),
    [
        ("bibert", {"quantize_act": False}),
        ("bibert", {"weight_bits": 2}),
        ("bit", {"weight_bits": 32}),
        ("bit", {"weight_quant_method": "uniform"}),
        ("bit", {"input_quant_method": "bwn"}),
        ("bit", {"input_quant_method": "uniform"}),
        ("bit", {"learnable_scaling": False}),
        ("bit", {"input_layerwise": False}),
        ("bit", {"sym_quant_qkvo": False}),
        ("bit", {"sym_quant_ffn_attn": True}),
        ("bit", {"not_quantize_attention": True}),
        ("binarybert", {"weight_bits": 2}),
        ("binarybert", {"weight_quant_method": "twn"}),
        ("binarybert", {"input_quant_method": "elastic"}),
        ("binarybert", {"learnable_scaling": False}),
        ("binarybert", {"sym_quant_qkvo": False}),
        ("binarybert", {"input_layerwise": False}),
        *[("bibert", {name: size + 1}) for name, size in SHAPE.items()],
    ],
    ids=str,
)
def test_settings_that_mean_another_model_are_refused(scheme, change):
    ((name, got),) = change.items()
    text = refused(checkpoint(scheme), config={**PUBLISHED[scheme], **change})
    line = next(line for line in text.splitlines() if f"{name}: got {got!r}" in line)
    assert "try" in line


@pytest.mark.parametrize("scheme", ["bibert", "bit", "binarybert"])
def test_input_bits(scheme):
    wrong = 4 if scheme != "binarybert" else 3
    config = {**PUBLISHED[scheme], "input_bits": wrong}
    assert f"got {wrong} bits" in refused(checkpoint(scheme), config=config)
    config.pop("input_bits")
    if scheme == "binarybert":  # 4 and 8 have equal entries
        assert "input_bits: got none, need" in refused(checkpoint(scheme), config=config)
        model = filbert.binarize(checkpoint(scheme), config=config, activation_bits=4, check=False)
        assert model.about["activation_bits"] == 4
    else:
        filbert.binarize(checkpoint(scheme), config=config, check=False)


@pytest.mark.parametrize("scheme", ["bibert", "bit", "binarybert"])
def test_epsilon_of_layer_norms(scheme):
    """BiBERT's code takes the config's, the others 1e-12 whatever it says."""
    config = {**PUBLISHED[scheme], "layer_norm_eps": 1e-5}
    model = filbert.binarize(checkpoint(scheme), config=config, check=False)
    layers = model.to_config()["encoder"]["layers"]
    found = {eps for layer in layers for eps in layer["eps"]} | {model.embeddings.norm.eps}
    assert found == {1e-5 if scheme == "bibert" else 1e-12}
    said = any("layer_norm_eps is 1e-12" in note for note in model.report.notes)
    assert said == (scheme != "bibert")


@pytest.mark.parametrize("scheme", ["bit", "binarybert"])
@pytest.mark.parametrize("some", [True, False])
def test_scales_that_no_batch_has_set_are_refused(scheme, some):
    """The published codes begin with 1 and set it at the first call, so 1 means no scale."""
    state = checkpoint(scheme)
    names = [name for name in state if name.endswith("clip_val") or "self.clip_" in name]
    for name in names[:1] if some else names:
        state[name] = torch.tensor(1.0)
    text = refused(state, config=PUBLISHED[scheme])
    assert f"{1 if some else len(names)} scales, " in text
    assert "got exactly 1" in text
    assert "try calibrating" in text


def test_steps_below_the_floor_are_refused():
    state = checkpoint("binarybert")
    name = "bert.encoder.layer.1.attention.self.clip_key"
    for value in (-0.02, 0.0, 1e-6):
        state[name] = torch.tensor(value)
        assert "clip_key: got" in refused(state, config=LSQ)


@pytest.mark.parametrize("embed", [True, False])
@pytest.mark.parametrize("scheme", ["bit", "binarybert"])
def test_scales_of_weights(scheme, embed):
    """By layer, if nothing is said; a table's by row."""
    state, config = checkpoint(scheme), {**PUBLISHED[scheme], "embed_layerwise": embed}
    words = filbert.binarize(state, config=config, check=False).embeddings.words[0]
    assert (len(words.alpha[1:].unique()) == 1) == embed  # but for the padding row's, of zeros
    for layerwise in (True, False, None):
        config["weight_layerwise"] = layerwise
        if layerwise is None:
            del config["weight_layerwise"]
        layer = (
            filbert.binarize(state, config=config, check=False).encoder.layers[0].feed_forward.up
        )
        assert (len(layer.alpha.unique()) == 1) == (layerwise is not False)


def test_what_depends_on_the_whole_batch_is_refused_unless_asked():
    state = checkpoint("binarybert")
    gelu = {**LSQ, "sym_quant_ffn_attn": False}
    clipped = {
        name: torch.tensor([-2.5, 1.5]) if name.endswith("clip_val") or "self.clip_" in name else t
        for name, t in state.items()
    }
    uniform = {**LSQ, "input_quant_method": "uniform"}
    for entries, config, words in (
        (state, gelu, "sym_quant_ffn_attn: got false with hidden_act 'gelu'"),
        (clipped, uniform, "input_quant_method: got 'uniform'"),
        (clipped, FEW_BITS, "input_quant_method: got 'uniform'"),
    ):
        text = refused(entries, config=config)
        assert words in text
        assert "whole batch" in text
        assert "try approximate=True" in text
        model = filbert.binarize(entries, config=config, approximate=True)
        assert any(note.startswith(f"approximated: {words}") for note in model.report.notes)
        assert outputs(model).isfinite().all()
        assert max(p.mismatches for p in model.report.parts) <= 5
    relu = filbert.binarize(state, config={**gelu, "hidden_act": "relu"}, check=False)
    assert any("count from 0" in note for note in relu.report.notes)


def test_own_clips_of_query_key_and_value():
    state = checkpoint("binarybert")
    for name in state:
        if name.endswith("clip_val"):
            state[name] = torch.tensor([-2.5, 2.5])
    for which, clip in (("query", 1.0), ("key", 2.0), ("value", 3.0), ("attn", 4.0)):
        for index in range(SIZES["layers"]):
            name = f"bert.encoder.layer.{index}.attention.self.clip_{which}"
            state[name] = torch.tensor([-clip, clip])
    model = filbert.binarize(state, config=FEW_BITS, approximate=True)
    attention = model.encoder.layers[0].attention
    assert attention.clips == [1.0, 2.0, 3.0]
    torch.testing.assert_close(attention.scales, torch.tensor([1.0, 2.0, 3.0, 1.0]) / 127)


def test_some_of_the_scales_of_attention_are_refused():
    whole = checkpoint("binarybert")
    name = "bert.encoder.layer.0.attention.self.clip_key"
    for entry in (None, torch.tensor([-2.5, 2.5])):
        state = {key: t for key, t in whole.items() if key != name}
        if entry is not None:
            state[name] = entry
        assert "clip_*: got some, need four" in refused(state, config=FEW_BITS, approximate=True)


def test_an_ordinary_model_has_scales_of_each_row():
    """Nothing was published about it: filbert's own rule, and no approximation of another."""
    model = build("bert", hidden_size=64, num_attention_heads=2)
    made = filbert.binarize(model, scheme="binarybert", trained=True)
    assert made.encoder.layers[0].attention.scales is None
    assert not any("approximated" in note for note in made.report.notes)
    assert max(p.mismatches for p in made.report.parts) <= 5
