"""Models with weights of low rank: what they compute, what is refused, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch

import filbert
from cases import normal
from filbert.nn import FeedForwardLowRank, LinearLowRank, load_encoder
from filbert.nn.build import JOINT
from models import MASKS, build, swapped
from models import run as run_padded
from tolerances import assert_close_to_native, assert_exact

FAMILIES = ["bert", "roberta", "distilbert"]


def run(model) -> torch.Tensor:
    """The hidden states of kept tokens."""
    return run_padded(model)[MASKS["right"].bool()]


def texts(model, count: int = 12):
    """Arguments of the model: few tokens each, without padding."""
    generator = torch.Generator().manual_seed(5)
    return [
        {"input_ids": torch.randint(5, model.config.vocab_size, (1, 9), generator=generator)}
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_rank_changes_nothing_but_the_last_bits(family):
    model = build(family)
    exact = run(copy.deepcopy(model).double())
    native = run(model)
    full = filbert.factorize(copy.deepcopy(model), ranks=10_000, never_slower=False)
    layer = swapped(full).packed_layers[0]
    assert isinstance(layer.feed_forward, FeedForwardLowRank)
    assert isinstance(layer.out, LinearLowRank)
    # Two products in the place of each, so errors of twice as many roundings.
    assert_close_to_native(run(full), native, exact, factor=6.0)
    assert filbert.factorization_report(full).param_ratio > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
def test_it_computes_what_its_weights_say(family, calibrated):
    """A reverted model has the products as its weights, and gives the same hidden states."""
    model = build(family)
    before = run(model)
    made = filbert.factorize(model, ranks=8, calibration=texts(model) if calibrated else None)
    packed = run(made)
    report = filbert.factorization_report(made)
    assert {row.rank for row in report.rows} == {8}
    assert all(0 < row.kept < 1 for row in report.rows)
    assert "of the multiply-adds" in str(report)
    plain = filbert.revert(made)
    assert_close_to_native(packed, run(plain), run(copy.deepcopy(plain).double()), factor=6.0)
    assert float((packed - before).abs().max()) > 1e-3


def test_calibration_keeps_more_of_what_the_model_computes():
    model = build("bert")
    given = texts(model, 40)

    def held_out(model) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(**one).last_hidden_state for one in given[30:]])

    def lost(**options) -> float:
        made = filbert.factorize(copy.deepcopy(model), **options)
        return float((held_out(made) - held_out(model)).square().mean())

    plain = lost(ranks=12)
    assert lost(ranks=12, calibration=given[:30]) < 0.8 * plain


def test_a_budget_is_kept():
    model = build("bert")
    made = filbert.factorize(copy.deepcopy(model), param_ratio=0.6, calibration=texts(model))
    report = filbert.factorization_report(made)
    assert report.param_ratio <= 0.6
    everything = filbert.factorize(copy.deepcopy(model), energy=1.0)
    rows = filbert.factorization_report(everything).rows
    assert all(row.rank is None for row in rows)
    assert_exact(run(everything), run(filbert.convert(copy.deepcopy(model))))


def test_factors_that_gain_nothing_run_as_their_product():
    model = build("bert")
    slow = filbert.factorize(copy.deepcopy(model), ranks=10_000, never_slower=False)
    ranks = {"re:attention.output": 30, "re:.*": 10_000}
    made = filbert.factorize(copy.deepcopy(model), ranks=ranks)
    assert not swapped(made).compressed[0]
    for row in filbert.factorization_report(made).rows:
        assert row.rank is not None
        assert row.as_product
        assert "dense product: only" in row.runs
        assert row.numbers == row.dense_numbers
    layer = swapped(made).packed_layers[0]
    assert not isinstance(layer.feed_forward, FeedForwardLowRank)
    assert not isinstance(layer.out, LinearLowRank)
    exact = run(copy.deepcopy(filbert.revert(made)).double())
    assert_close_to_native(run(filbert.convert(made)), run(filbert.revert(made)), exact, factor=6.0)
    assert type(swapped(slow).packed_layers[0].out) is LinearLowRank


def test_layers_may_differ():
    """Slots of one layer are dense and those of another of low rank."""
    model = build("bert")
    for layer in model.encoder.layer[:1]:
        for linear in (layer.intermediate.dense, layer.output.dense):
            outputs, width = linear.weight.shape
            low = normal(outputs, 4) @ normal(4, width, seed=1) / width
            linear.weight.data.copy_(low)
    made = filbert.factorize(model, energy=0.9999)
    layers = swapped(made).packed_layers
    assert isinstance(layers[0].feed_forward, FeedForwardLowRank)
    assert not isinstance(layers[1].feed_forward, FeedForwardLowRank)
    assert JOINT not in swapped(made).compressed[1]


def test_ranks_by_name():
    ranks = {"re:query": 16, "re:attention.output": None, "re:layer.0": 9, "re:.*": 7}
    made = filbert.factorize(build("bert"), ranks=ranks)
    rows = filbert.factorization_report(made).rows
    assert [row.rank for row in rows] == [16, None, 9, 9, 16, None, 7, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_encoder_is_saved_and_loaded(tmp_path, dtype):
    made = filbert.factorize(build("bert", dtype=dtype), ranks=9)
    encoder = swapped(made)
    encoder.save(tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    batch = filbert.PackedBatch.from_lengths([5, 0, 9])
    rows = normal(14, encoder.hidden_size).to(dtype)
    with torch.inference_mode():
        assert_exact(loaded.forward_packed(rows, batch), encoder.forward_packed(rows, batch))


def test_refuses_what_does_not_fit():
    model = build("bert")
    before = run(model)
    for options, said in (
        ({}, "budget: need one of"),
        ({"ranks": 8, "energy": 0.9}, "budget: need one of"),
        ({"ranks": 0}, "ranks: got 0"),
        ({"param_ratio": 2.0}, "param_ratio: got 2.0"),
        ({"ranks": 8, "calibration": []}, "got no sample"),
    ):
        with pytest.raises(ValueError, match=said):
            filbert.factorize(model, **options)
    assert_exact(run(model), before)
    with pytest.raises(ValueError, match="was not factorized here"):
        filbert.factorization_report(model)
    with pytest.raises(ValueError, match="has weights of low rank"):
        filbert.save_quantized(filbert.factorize(build("bert"), ranks=8), "nowhere")


def test_weights_that_were_written_are_refused():
    """The factors are packed; a weight that is loaded afterwards is not theirs."""
    made = filbert.factorize(build("bert"), ranks=8)
    state = made.state_dict()
    made.load_state_dict(state)
    assert_exact(run(made), run(copy.deepcopy(made)))
    other = {k: v + 0.1 if k.endswith("dense.weight") else v for k, v in state.items()}
    made.load_state_dict(other)
    with pytest.raises(RuntimeError, match="is not the product of its factors"):
        run(made)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_kind(mask, attention):
    """None, 2-D, and the additive or boolean 4-D ones that attention implementations make of it;
    padding on either side, and texts that are all padding."""
    model = build("bert", attention=attention, hidden_size=64, num_attention_heads=2)
    model = filbert.factorize(model, ranks=16)
    plain = copy.deepcopy(filbert.revert(copy.deepcopy(model)))
    keep = MASKS[mask]
    for given in (keep, keep.bool(), *([None] if keep.all() else [])):
        with torch.inference_mode():
            got, right = (
                m(torch.arange(keep.numel()).view(keep.shape) % 30, attention_mask=given)[0]
                for m in (model, plain)
            )
        kept = keep.bool()
        assert got.isfinite().all()
        torch.testing.assert_close(got[kept], right[kept], rtol=1e-3, atol=1e-4)
