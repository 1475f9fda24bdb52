"""What ``filbert.binarize`` reads, from a checkpoint and its config, and what it refuses; and what
``filbert.load_binary`` does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import filbert
from binarize_cases import own, refused
from binary_reference import CONFIG, FEW_BITS, batch, checkpoint
from models import build
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["object", "file", "compiled"])
def test_a_saved_student_converts_like_the_model(kind, tmp_path):
    """Its config, or config.json, tells everything that its entries do not."""
    cases = (("binarybert", {"bits": 4, "hidden_act": "relu"}), ("binarybert", {"mode": "row"}),
             ("bibert", {"ties": "above", "score_ties": "above"}),
             ("bit", {"granularity": "tensor", "ties": "above"}))  # fmt: skip
    for scheme, options in cases:
        student = own(scheme, **options)
        student.calibrate(*batch(3))
        student.save(tmp_path)
        state, config = student.state_dict(), student.config
        if kind == "file":
            config = json.loads((tmp_path / "config.json").read_text())
        if kind == "compiled":
            state = {f"_orig_mod.{name}": t for name, t in state.items()}
        whole = filbert.binarize(student, check=False)
        saved = filbert.binarize(state, config=config, check=False)
        assert saved.to_config() == whole.to_config()
        for name, t in whole.state_dict().items():
            assert_exact(saved.state_dict()[name], t)
    other = {**student.config.to_dict(), "version": 9}
    assert "of version 9" in refused(student.state_dict(), config=other)
    other = own("bibert").config
    assert "the entries are those of 'bit'" in refused(student.state_dict(), config=other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "roberta"}, "model_type: got 'roberta', need 'bert'"),
        ({"model_type": "xlm-roberta"}, "model_type: got"),
        ({"is_decoder": True}, "is_decoder: got a decoder"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: got"),
    ],
)
def test_other_architectures_are_refused(change, words, monkeypatch):
    assert words in refused(checkpoint("bibert"), config={**CONFIG, **change})
    model = build("bert", hidden_size=64, num_attention_heads=2)
    vars(model.config).update({k: v for k, v in change.items() if k != "model_type"})
    monkeypatch.setattr(type(model.config), "model_type", change.get("model_type", "bert"))
    assert words in refused(model, scheme="bibert", trained=True)
    assert words in refused(model, scheme="bibert", trained=True, config=CONFIG)  # its own counts


@pytest.mark.parametrize("name", ["encoder.layer.0.crossattention.self.query.weight",
                                  "encoder.relative.weight", "embeddings.more.weight"])  # fmt: skip
def test_unknown_entries_are_refused(name):
    state = {**checkpoint("bibert"), f"bert.{name}": torch.ones(4, 4)}
    assert f"entries that no scheme has: {name}" in refused(state, config=CONFIG)


def test_hidden_act():
    """The published BiBERT has GELU in its code; weights of other code have what is stated."""
    new, relu = ({**CONFIG, "hidden_act": name} for name in ("gelu_new", "relu"))
    for scheme in ("bit", "binarybert"):
        assert "hidden_act: got 'gelu_new'" in refused(checkpoint(scheme), config=new)
    published = filbert.binarize(checkpoint("bibert"), config=relu, check=False)
    assert published.to_config()["encoder"]["layers"][0]["feed_forward"]["activation"] == "gelu"
    plain = build("bert", hidden_size=64, num_attention_heads=2).state_dict()
    assert "hidden_act: got 'gelu_new'" in refused(plain, config=new, scheme="bibert", trained=True)
    other = filbert.binarize(plain, config=relu, scheme="bibert", trained=True, check=False)
    assert other.to_config()["encoder"]["layers"][0]["feed_forward"]["activation"] == "relu"


def test_activation_bits_are_those_of_training():
    student = own("binarybert", bits=4)
    student.calibrate(*batch(3))
    assert "got 8, but it was trained with 4" in refused(student, activation_bits=8)
    assert filbert.binarize(student, activation_bits=4, check=False).about["activation_bits"] == 4
    state, config = checkpoint("binarybert"), {**CONFIG, "input_bits": 8}
    assert "but it was trained with 8" in refused(state, config=config, activation_bits=4)
    assert "got 0 bits" in refused(state, config=CONFIG, activation_bits=0)


def test_heads_are_not_guessed():
    text = refused(checkpoint("bibert"))
    assert "num_attention_heads: got none, need config={'num_attention_heads': ...}" in text
    assert "num_attention_heads: got 0" in refused(
        checkpoint("bibert"), config={"num_attention_heads": 0}
    )


def test_task_heads():
    state = {**checkpoint("bibert"), "cls.predictions.bias": torch.ones(3)}
    report = filbert.binarize(state, config=CONFIG, check=False).report
    assert "cls.*, is dropped" in str(report)
    assert "taken to be one of texts" in str(report)
    for name, head in (("BertForTokenClassification", "tokens"),
                       ("BertForSequenceClassification", "pooled")):  # fmt: skip
        model = filbert.binarize(
            checkpoint("bibert"), config={**CONFIG, "architectures": [name]}, check=False
        )
        assert model.head == head
        assert not model.report.notes
    student = own("bibert")
    assert not filbert.binarize(student, check=False).report.notes
    tokens = build("bert", "TokenClassification", hidden_size=64, num_attention_heads=2)
    assert filbert.binarize(tokens, scheme="bibert", trained=True, check=False).head == "tokens"


LAYER = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (f"{LAYER}.bias", torch.full((64,), float("inf")), "dense.bias: got 64 infinite or NaN"),
        (f"{LAYER}.bias", torch.ones(64, 1), "dense.bias: got torch.float32 (64, 1)"),
        (f"{LAYER}.move.bias", torch.full((80,), float("nan")), "move.bias: got 80 infinite"),
        ("bert.pooler.dense.weight", torch.randn(32, 64), "pooler.dense.bias: got (64,)"),
        ("classifier.weight", torch.randn(3, 32), "classifier.weight: got (3, 32)"),
        ("classifier.bias", torch.randn(4), "classifier.bias: got (4,)"),
        ("bert.embeddings.LayerNorm.bias", torch.ones(1), "embeddings.LayerNorm.bias: got (1,)"),
    ],
)
def test_unfit_entries_are_named(name, value, words):
    state = checkpoint("bit")
    assert name in state
    assert words in refused({**state, name: value}, config=CONFIG)


def test_a_pooler_of_another_size():
    state = checkpoint("bibert")
    state["bert.pooler.dense.weight"] = torch.randn(32, 64)
    state["bert.pooler.dense.bias"] = torch.randn(32)
    assert "pooler.dense.weight: got (32, 64), need (64, 64)" in refused(state, config=CONFIG)


def test_split_layers():
    state = checkpoint("binarybert", split=True)
    name = "embeddings.word_embeddings_2.weight"
    text = refused({**state, f"bert.{name}": torch.randn(9, 64)}, config=FEW_BITS)
    assert f"{name}: got (9, 64)" in text
    plain = {k: v for k, v in state.items() if "clip" not in k}
    text = refused(plain, config=CONFIG, scheme="bibert", trained=True)
    assert "layer.0.attention.self.query_1.weight: got a split layer" in text


def test_what_is_no_state_dict(tmp_path):
    state = checkpoint("bibert")
    for name in ("model", "state_dict"):
        text = refused({name: state, "epoch": 3}, config=CONFIG)
        assert f"the entry '{name}' is itself a state dict; pass that" in text
        assert "Paddle" not in text
    for path in (tmp_path, str(tmp_path)):
        assert "load it first: torch.load(...) or BinarizedBert.load(folder)" in refused(path)
    assert "config: got a str, need a dict" in refused(state, config="config.json")
    assert "1: got int as name" in refused({1: torch.ones(1)})
    assert "epoch: got int, need tensors only" in refused({**state, "epoch": 3}, config=CONFIG)


def change_file(path, change):
    """Rewrites the metadata of a saved model."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["filbert.binary"])
    save_file(tensors, path, {"filbert.binary": json.dumps(change(about))})


def test_broken_files(tmp_path):
    path = tmp_path / "made" / "model.safetensors"
    filbert.binarize(checkpoint("bibert"), config=CONFIG, check=False).save(path)
    whole = path.read_bytes()

    def load_fails(words, where=path):
        with pytest.raises(ValueError, match=words) as caught:
            filbert.load_binary(where)
        assert str(where) in str(caught.value)

    load_fails("got a folder, need", tmp_path)
    for content in (b"", whole[:100], whole[:-5], b"PK" + b"x" * 500):
        path.write_bytes(content)
        load_fails("no whole safetensors file")
    save_file({"x": torch.ones(1)}, path, {"filbert.binary": "{"})
    load_fails("no JSON")
    save_file({"x": torch.ones(1)}, path, {"filbert.binary": "[1]"})
    load_fails("got a list as metadata, need a dict")

    def without(about):
        del about["config"]["encoder"]["layers"][0]["feed_forward"]["up"]
        return about

    def huge(about):
        about["config"]["embeddings"]["position"] = [1 << 45, 64]
        return about

    def wide(about):
        about["config"]["encoder"]["layers"][1]["feed_forward"]["up"]["out_features"] = 1 << 45
        return about

    for change, words in (
        (lambda about: {**about, "config": None}, "got a NoneType as config"),
        (lambda about: {**about, "config": {}}, "a config without 'embeddings'"),
        (without, "a config without 'up'"),
        (huge, "embeddings.position .got torch.float32 .24, 64.*35184372088832"),
        (wide, r"packed_layers.1.feed_forward.up.weight .got"),
    ):
        path.write_bytes(whole)
        change_file(path, change)
        load_fails(words)
    path.write_bytes(whole)
    assert filbert.load_binary(path).about["scheme"] == "bibert"


def test_an_ordinary_model_is_refused():
    model = build("bert", "SequenceClassification", hidden_size=64, num_attention_heads=2)
    text = refused(model)
    for words in ("no entry says", "distil", 'scheme="binarybert", activation_bits=8', "trained="):
        assert words in text
    text = refused(model, scheme="bibert")
    assert "without trained=True" in text
    forced = filbert.binarize(model, scheme="bibert", trained=True)
    assert forced.report.ties_met > forced.report.mismatches == 0
    few = filbert.binarize(model, scheme="binarybert", activation_bits=8, trained=True, check=False)
    assert few.about["activation_bits"] == 8
    assert "need BiT's scale" in refused(model, scheme="bit", trained=True).replace("\n", " ")


def test_signs_without_scales_are_refused():
    state = checkpoint("bibert")
    signs = {
        k: v.sign() if v.ndim == 2 and "position" not in k and "type" not in k else v
        for k, v in state.items()
    }
    text = refused(signs, config=CONFIG)
    assert "signs saved by themselves have lost scales" in text
    assert text.count("latent") > 10  # every such layer is named


def test_other_layouts_are_refused():
    paddle = {"bert.encoder.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    assert "Paddle" in refused(paddle)
    pooled = {
        **checkpoint("bit"),
        "bert.encoder.layer.0.attention.self.v_p.weight": torch.ones(1, 4),
    }
    assert "BiPFT" in refused(pooled, config=CONFIG)
    both = refused({**paddle, **pooled})
    assert "Paddle" in both
    assert "BiPFT" in both


def test_all_reasons_at_once():
    state = checkpoint("bit")
    del state["bert.encoder.layer.0.output.dense.weight"]
    state["bert.encoder.layer.1.output.dense.bias"] = torch.ones(7)
    state["bert.encoder.layer.1.output.dense.input_clip_val"] = torch.tensor(float("nan"))
    text = refused(state, config={**CONFIG, "sym_quant_ffn_attn": True, "input_bits": 2})
    for words in ("layer.0.output.dense.weight: got nothing", "need [64]", "got nan",
                  "sym_quant_ffn_attn", "got 2 bits"):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheme": "bit"}, "its entries are those of 'bibert'"),
        ({"scheme": "xnor"}, "scheme: got 'xnor'"),
        ({"config": {"num_attention_heads": 4}}, "need a multiple of 32"),
        ({"config": {"num_attention_heads": 2, "weight_bits": 2}}, "weight_bits: got 2"),
        ({"activation_bits": 4}, "got 4 bits"),
    ],
)
def test_choices_that_do_not_fit(change, words):
    assert words in refused(checkpoint("bibert"), **{"config": CONFIG, **change})


def test_layers_missing_or_of_other_sizes():
    state = checkpoint("bibert")
    gap = {k: v for k, v in state.items() if "layer.0." not in k}
    assert "need layers from 0 on" in refused(gap, config=CONFIG)
    state["bert.encoder.layer.1.output.dense.weight"] = torch.randn(64, 81)
    assert "need (64, 80)" in refused(state, config=CONFIG)


def test_uncalibrated_students_are_refused():
    assert "try calibrating" in refused(own("bit"))
