"""Which kind each slot of each layer is: plans, and models that follow them."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from filbert import ConvertError, EncoderPlan, LayerPlan, convert, report, revert
from filbert.nn import BinaryFeedForward, FeedForward, load_encoder
from filbert.plan import PackedEncoderConfig
from models import assert_same_state, build, swapped
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = LayerPlan.all("binary")
MIXED = EncoderPlan(layers={1: LayerPlan(feed_forward="binary")}, trained=True)


def bert(**settings):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96, **settings}
    return build("bert", **sizes)


def hidden(model):
    ids = torch.arange(12).view(2, 6) % 20
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.inference_mode():
        return model(ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize(
    "plan", [MIXED, EncoderPlan(default=BITS, trained=True), EncoderPlan()], ids=str
)
def test_plans_go_through_json(plan):
    assert EncoderPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "version is None, need 1"),
        ({"version": 2}, "version is 2"),
        ({"version": 1}, "'default'"),
        ({**MIXED.to_dict(), "layers": {"1": {"feed_forward": "ternary"}}}, "'ternary', need one"),
        ({**MIXED.to_dict(), "layers": {"1": {"inner": "dense"}}}, "inner"),
        ({**MIXED.to_dict(), "trained": "no"}, "trained is 'no', need True"),
        ({**MIXED.to_dict(), "layers": []}, "try EncoderPlan"),
    ],
)
def test_plans_that_are_none(data, words):
    with pytest.raises(ValueError, match=words):
        EncoderPlan.from_dict(data)


def test_a_dense_plan_is_an_ordinary_conversion():
    model = bert()
    expected = hidden(convert(copy.deepcopy(model)))
    assert_exact(hidden(convert(model, EncoderPlan())), expected)
    assert convert(model) is model  # the same plan: nothing to do
    with pytest.raises(ConvertError, match="already converted with other settings"):
        convert(model, MIXED)


def test_one_slot_of_bits_and_the_rest_dense(tmp_path):
    model = bert()
    plain, state = hidden(convert(copy.deepcopy(model))), copy.deepcopy(model.state_dict())
    model = convert(model, MIXED)
    layers = swapped(model).layers
    assert [type(layer.feed_forward) for layer in layers] == [FeedForward, BinaryFeedForward]
    mixed = hidden(model)
    assert mixed.isfinite().all()
    assert not torch.equal(mixed, plain)
    assert {row.kernel.split()[0] for row in report(model) if "Linear" in row.now} == {
        "filbert", "linear_binary",
    }  # fmt: skip
    # The latent weights are still there: a copy, a saved dictionary and the original have them.
    assert_exact(hidden(copy.deepcopy(model)), mixed)
    assert_same_state(model.state_dict(), state)
    model.load_state_dict(state)
    assert_exact(hidden(model), mixed)
    swapped(model).save(tmp_path / "encoder.safetensors")
    loaded, x = load_encoder(tmp_path / "encoder.safetensors"), torch.randn(2, 6, 64)
    with torch.inference_mode():
        assert_exact(loaded(x), swapped(model)(x)[0])
    assert_same_state(revert(model).state_dict(), state)


def test_every_layer_of_bits():
    model = convert(bert(), EncoderPlan(default=BITS, trained=True))
    assert [layer.keeps_weights() for layer in swapped(model).layers] == [[False] * 6] * 2
    assert hidden(model).isfinite().all()


@pytest.mark.parametrize(
    ("plan", "settings", "words"),
    [
        (EncoderPlan(default=BITS), {}, "compute noise; .*trained=True"),
        (EncoderPlan(layers={2: LayerPlan()}), {}, "names layer 2, need 0 to 1"),
        (EncoderPlan(default=BITS, trained=True), {"num_attention_heads": 4}, "heads of 16"),
        (MIXED, {"hidden_act": "silu"}, "layer 1: binary feed-forward"),
    ],
)
def test_plans_that_a_model_cannot_follow(plan, settings, words):
    model = bert(**settings)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ConvertError, match=words):
        convert(model, plan)
    assert_same_state(model.state_dict(), state)


def test_combinations_that_cannot_run():
    with pytest.raises(ValueError, match="need out='binary'"):
        LayerPlan(attention="binary")
    with pytest.raises(ValueError, match="out is 'half', need one of"):
        LayerPlan(out="half")


def test_settings_of_a_plan():
    plan = EncoderPlan(settings=PackedEncoderConfig(masked_rows="compute"))
    model = convert(bert(), plan)
    assert swapped(model).masked_rows == "compute"
    assert (hidden(model)[1, 4:] != 0).any()
