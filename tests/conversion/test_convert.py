"""convert, revert and report: what is refused and why, and that nothing is ever lost."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
import transformers
from torch import nn

from filbert.conversion.in_place import ConvertError, convert, report, revert
from filbert.conversion.swap import SwappedEncoder
from filbert.nn import PackedLinear
from filbert.plan import PackedEncoderConfig
from models import FAMILIES, MASKS, assert_same_state, bits, build, randomise, run, swapped, tokens
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

MASK = MASKS["right"]
TINY = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 80, "max_position_embeddings": 64,
}  # fmt: skip


def refused(model, **kwargs) -> str:
    """The message of the refusal; the model must be untouched."""
    before, modules = bits(model), [type(m) for m in model.modules()]
    with pytest.raises(ConvertError) as caught:
        convert(model, **kwargs)
    assert_same_state(model.state_dict(), before)
    assert [type(m) for m in model.modules()] == modules
    assert caught.value.reasons
    for reason in caught.value.reasons:
        assert reason in str(caught.value)
    return str(caught.value)


# --- in place, and back ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_is_in_place_and_revert_is_bitwise(family, dtype):
    model = build(family, "SequenceClassification", dtype=dtype)
    before, answer = bits(model), run(model)
    names = [name for name, _ in model.named_modules()]
    parameters = dict(model.named_parameters())
    grads = {name: p.requires_grad for name, p in parameters.items()}
    assert convert(model) is model
    assert_same_state(model.state_dict(), before)
    assert revert(model) is model
    assert_same_state(model.state_dict(), before)
    assert [name for name, _ in model.named_modules()] == names
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad == grads[name]
    assert_exact(run(model), answer)


def test_a_reverted_model_trains():
    model = revert(convert(build("bert", "SequenceClassification")))
    model.train()
    model(
        tokens(MASK), attention_mask=MASK, labels=torch.zeros(3, dtype=torch.long)
    ).loss.backward()
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().max() > 0


def test_converting_inside_inference_mode_leaves_no_trace():
    model = build("bert", "SequenceClassification")
    with torch.inference_mode():
        convert(model)
        run(model)
        revert(model)
    model(tokens(MASK), attention_mask=MASK).logits.sum().backward()


def test_no_second_copy_of_the_weights():
    """The dense weights are gone after conversion: the skeleton's are placeholders, or views."""
    model = build("bert")
    linears = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)]
    storages = [weakref.ref(m.weight.untyped_storage()) for m in linears]
    convert(model)
    gc.collect()
    encoder = swapped(model)
    kept = {m.backend for m in encoder.modules() if isinstance(m, PackedLinear)}
    if "linear" not in kept:
        held = {m.weight.untyped_storage().data_ptr(): m.weight.untyped_storage() for m in linears}
        assert sum(s.nbytes() for s in held.values()) == max(m.weight.nbytes for m in linears)
        assert all(ref() is None for ref in storages)
    assert encoder.is_packed


def test_converting_twice_does_nothing():
    model = convert(build("bert"))
    encoder = swapped(model)
    assert convert(model) is model
    assert swapped(model) is encoder
    with pytest.raises(ConvertError, match="other settings"):
        convert(model, PackedEncoderConfig(fold_bias=False))
    revert(revert(model))


def test_an_encoder_that_appears_twice_is_converted_once():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = build("bert")
            self.right = build("bert")
            self.right.encoder = self.left.encoder

    model = Siamese().eval()
    answer = run(model.right)
    convert(model)
    assert model.left.encoder is model.right.encoder
    assert isinstance(model.right.encoder, SwappedEncoder)
    torch.testing.assert_close(
        run(model.right)[MASK.bool()], answer[MASK.bool()], rtol=1e-4, atol=1e-4
    )
    revert(model)
    assert model.left.encoder is model.right.encoder
    assert_exact(run(model.right), answer)


def test_an_encoder_in_a_model_that_is_not_from_transformers():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build("bert").encoder

        def forward(self, x):
            return self.body(x)[0]

    model, x = Own().eval(), torch.randn(2, 5, 48)
    with torch.inference_mode():
        native = model(x)
        torch.testing.assert_close(convert(model)(x), native, rtol=1e-4, atol=1e-4)


# --- refused at convert ---


def look_alike(name: str, **settings):
    config = getattr(transformers, f"{name}Config")(**{**TINY, **settings})
    return randomise(getattr(transformers, f"{name}Model")(config).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("MegatronBert", {}, "unknown module 'ln'"),
        ("RobertaPreLayerNorm", {}, "unknown module 'LayerNorm'"),
        ("XLMRobertaXL", {}, "unknown module"),
        ("Nystromformer", {"num_landmarks": 4, "segment_means_seq_len": 8},
         "unknown attribute 'num_landmarks'"),
        ("MPNet", {}, "relative_attention_bias"),
        ("LayoutLMv3", {"visual_embed": False}, "has_relative_attention_bias"),
        ("Bros", {"max_2d_position_embeddings": 64}, "encoder"),
        ("Albert", {"embedding_size": 24}, "embedding_hidden_mapping_in"),
        ("RoFormer", {}, "embed_positions"),
        ("BigBird", {"attention_type": "block_sparse"}, "unknown attribute 'block_size'"),
        ("BigBird", {"attention_type": "original_full"}, "unknown attribute 'attention_type'"),
        ("ConvBert", {"embedding_size": 24}, "unknown module"),
        ("Yoso", {}, "unknown attribute"),
        ("Esm", {"pad_token_id": 1}, "unknown module 'LayerNorm'"),
        ("MobileBert", {}, "bottleneck"),
        ("GPT2", {"n_embd": 48, "n_layer": 2, "n_head": 3}, "GPT2Model"),
        ("ViT", {"image_size": 8, "patch_size": 4}, "layernorm_before"),
    ],
)  # fmt: skip
def test_look_alikes(name, settings, reason, dtype):
    assert reason in refused(look_alike(name, **settings).to(dtype))


def test_relative_positions_of_transformers_4():
    """There, a setting changes what the same class computes; in version 5 it is gone."""
    model = look_alike("Bert", position_embedding_type="relative_key")
    inner = model.encoder.layer[0].attention.self
    if not hasattr(inner, "distance_embedding"):
        inner.position_embedding_type = "relative_key"
        inner.distance_embedding = nn.Embedding(127, 16)
    message = refused(model)
    assert "distance_embedding" in message
    assert "position_embedding_type='relative_key'" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perfect_look_alike_is_caught_by_its_answers(dtype):
    """Same modules, same attributes, another meaning: only the example can tell."""
    model = build("bert", dtype=dtype)
    kind = type(model.encoder.layer[0].attention.self)

    class Sharper(kind):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states * 1.2, *args, **kwargs)

    for layer in model.encoder.layer:
        layer.attention.self.__class__ = Sharper
    message = refused(model)
    assert "computes something else" in message
    assert "differs by" in message
    convert(model, PackedEncoderConfig(check=False))
    assert swapped(model).is_packed


def test_all_reasons_at_once():
    model = build(
        "bert", attention="eager", hidden_size=264, num_attention_heads=1, is_decoder=True
    )
    model.double().train()
    model.config.output_attentions = True
    model.encoder.layer[1].output.dense = nn.Identity()
    message = refused(model)
    for words in (
        "head dimension 264: on cpu the attention kernel has 1 to 256", "is_decoder=True",
        "float64", "Identity", "training mode", "output_attentions=True",
    ):  # fmt: skip
        assert words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.train(), "training mode with dropout 0.1"),
        (lambda m: m.double(), "torch.float64"),
        (lambda m: m.to("meta"), "device meta"),
        (lambda m: setattr(m.config, "output_attentions", True), "output_attentions=True"),
        (lambda m: setattr(m.config, "is_decoder", True), "is_decoder=True"),
        (lambda m: m.encoder.layer[0].half(), "layers differ in dtype"),
        (lambda m: m.encoder.layer[0].output.LayerNorm.double(), "differ in dtype"),
        (lambda m: m.encoder.layer[0].bfloat16(), "layers differ in dtype"),
        (lambda m: m.encoder.layer[1].register_forward_hook(lambda *a: None), "forward hooks"),
        (lambda m: m.encoder.register_forward_pre_hook(lambda *a: None), "forward hooks"),
        (lambda m: setattr(m.encoder.layer[0], "forward", lambda *a: None), "forward replaced"),
        (lambda m: m.encoder.layer.append(m.encoder.layer[0]), "layers are shared"),
        (lambda m: setattr(m.encoder.layer[1].output.dense, "weight",
                           m.encoder.layer[0].output.dense.weight), "a parameter is shared"),
        (lambda m: nn.utils.parametrizations.weight_norm(m.encoder.layer[0].output.dense),
         "ParametrizedLinear"),
        (lambda m: setattr(m.encoder.layer[0].intermediate, "intermediate_act_fn", nn.PReLU()),
         "parameters of its own"),
        (lambda m: setattr(m.encoder.layer[0].attention.self, "secret", 3), "attribute 'secret'"),
        (lambda m: m.encoder.layer[0].register_buffer("secret", torch.ones(1)), "buffers"),
        (lambda m: setattr(m.encoder.layer[0].output, "LayerNorm", nn.RMSNorm(48)), "RMSNorm"),
        (lambda m: setattr(m.encoder.layer[0].output, "LayerNorm", nn.LayerNorm(48, bias=False)),
         "weight and a bias"),
        (lambda m: setattr(m.encoder.layer[0].output, "dropout", nn.AlphaDropout(0.0)),
         "AlphaDropout"),
        (lambda m: setattr(m.encoder.layer[0].output, "dense", nn.Linear(80, 40)), "need [48, 80]"),
    ],
)  # fmt: skip
def test_refusals(change, words):
    model = build("bert", attention="eager")
    change(model)
    with pytest.raises(ConvertError) as caught:
        convert(model)
    assert words in str(caught.value)


def test_cross_attention_is_refused():
    model = build("bert", is_decoder=True, add_cross_attention=True)
    message = refused(model)
    assert "cross-attention" in message
    assert "is_decoder=True" in message


def test_the_encoder_itself_cannot_be_replaced():
    model = build("bert")
    assert "the model itself" in refused(model.encoder)
    convert(model)
    with pytest.raises(ValueError, match="the model that holds it"):
        revert(model.encoder)


def test_training_without_dropout_is_no_reason():
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    convert(model.train())
    assert run(model).shape == (3, 9, 48)


def test_strict_is_all_or_nothing():
    model = nn.ModuleDict({"good": build("bert"), "bad": look_alike("MegatronBert")})
    message = refused(model)
    assert "bad.encoder" in message
    assert "good.encoder" not in message
    assert "strict=False" in message
    convert(model, strict=False)
    assert isinstance(model["good"].encoder, SwappedEncoder)
    rows = {row.name: row for row in report(model)}
    assert "unknown module 'ln'" in rows["bad.encoder"].reason
    assert rows["bad.encoder"].was == rows["bad.encoder"].now == "MegatronBertEncoder"
    assert convert(look_alike("MegatronBert"), strict=False)


def test_a_model_without_any_encoder():
    message = refused(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert "0 (Linear), 1 (ReLU)" in message


# --- report and settings ---


@pytest.mark.parametrize("family", FAMILIES)
def test_report(family):
    model = build(family, "SequenceClassification")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = report(model)
    assert {row.reason for row in plain} <= {"not part of an encoder", "not converted yet"}
    assert sum(row.bytes for row in plain) == size
    rows = list(report(convert(model)))
    heads = [row for row in rows if row.now == "SwappedEncoder"]
    assert len(heads) == 1
    was = next(row for row in plain if row.reason == "not converted yet")
    assert heads[0].name == was.name
    assert heads[0].bytes <= was.bytes  # the key bias and the value bias are gone
    inside = [row for row in rows if row.name.startswith(was.name + ".")]
    assert sum(row.bytes for row in inside) == heads[0].bytes
    linears = [row for row in inside if row.now == "PackedLinear"]
    assert len(linears) == 6  # four of every layer; the last has its query apart
    assert all(row.kernel and row.reason for row in linears)
    assert all(row.reason for row in rows if row.was == row.now)


def test_report_prints_an_aligned_table():
    lines = str(report(convert(build("bert")))).splitlines()
    assert lines[0].split() == ["name", "was", "now", "kernel", "bytes", "reason"]
    start = lines[0].index("was")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)
    assert len(report(nn.Linear(2, 2))) == 1


def test_config_round_trip():
    for config in (PackedEncoderConfig(), PackedEncoderConfig(fold_bias=False, check=False)):
        assert PackedEncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for bad, words in (
        ({"version": 99, "fold_bias": True, "check": True}, "version is 99"),
        ({"version": 1, "fold_bias": True}, "missing fields"),
        ({"version": 1, "fold_bias": 1, "check": True}, "need True or False"),
        ({"version": 1, "fold_bias": True, "check": True, "more": 2}, "unknown fields"),
    ):
        with pytest.raises(ValueError, match=words):
            PackedEncoderConfig.from_dict(bad)
