"""Hessians that are never formed, and the bits that follow from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import filbert
from cases import normal
from filbert.compress.quantize import hessian_traces, plan_bits, top_eigenvalues
from filbert.compress.quantize.allocation import Choice, allocate
from filbert.compress.quantize.sensitivity import distance, output_of
from models import build
from tolerances import assert_exact

SIZE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}


def two_layers():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def exact_hessian(model, weight, rows):
    """Of the squared distance: J.T @ J, by one backward pass for each output."""
    output = model(rows)
    jacobian = torch.stack([
        torch.autograd.grad(one, weight, retain_graph=True)[0].flatten()
        for one in output.flatten()
    ])  # fmt: skip
    return jacobian.T @ jacobian / output.shape[0]


def test_eigenvalues_and_traces_are_those_of_the_hessian():
    model, rows = two_layers(), [normal(7, 5, seed=i) for i in range(3)]
    blocks = {"first": [model[0].weight], "last": [model[2].weight]}
    tops = top_eigenvalues(model, blocks, rows, model, iterations=200, tolerance=1e-7)
    traces = hessian_traces(model, blocks, rows, model, probes=400)
    for name, (weight,) in blocks.items():
        hessians = [exact_hessian(model, weight, one) for one in rows]
        largest = torch.tensor([float(torch.linalg.eigvalsh(h)[-1]) for h in hessians])
        assert tops[name] == pytest.approx(float(largest.mean() + largest.std()), rel=1e-3)
        trace = sum(float(h.trace()) for h in hessians) / len(hessians) / weight.numel()
        assert traces[name] == pytest.approx(trace, rel=0.1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_outputs_of_all_kinds():
    x = normal(2, 3)
    for result in (x, (x,), {"sentence_embedding": x}, {"last_hidden_state": x, "logits": None}):
        assert output_of(result) is x
    assert float(distance(x)) == 0.0


def choice(weights, *costs):
    return Choice(("a",), weights, 1.0, dict(zip((2, 3, 4), costs, strict=True)))


def test_bits_go_where_they_save_most():
    mild, keen = choice(100, 1.0, 0.5, 0.2), choice(100, 9.0, 4.0, 1.0)
    assert allocate([mild, keen], 400) == [2, 2]
    assert allocate([mild, keen], 600) == [2, 4]
    assert allocate([mild, keen], 799) == [3, 4]
    assert allocate([mild, keen], 800) == [4, 4]
    # A step that saves little is no obstacle before one that saves much.
    assert allocate([choice(10, 5.0, 4.99, 0.0), choice(10, 1.0, 0.9, 0.8)], 60) == [4, 2]
    assert allocate([], 0) == []
    with pytest.raises(ValueError, match="budget: got 300 bits, need at least 400, 2 for each"):
        allocate([mild, keen], 300)


def samples():
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(5, 60, (1, n), generator=generator) for n in (5, 9)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]


@pytest.mark.parametrize("measure", ["trace", "eigenvalue", "results"])
def test_a_plan_of_a_model(measure):
    model = build("bert", attention="sdpa", **SIZE)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = plan_bits(model, samples(), avg_bits=3.0, measure=measure)
    assert model.config._attn_implementation == "sdpa"
    for name, t in model.state_dict().items():
        assert_exact(t, before[name])
    assert 2.0 < plan.average <= 3.0
    assert len(plan.bits) == 12
    assert set(plan.bits.values()) <= {2, 3, 4, 6}
    own = "encoder.layer.0.attention.self"
    assert plan.bits[f"{own}.query"] == plan.bits[f"{own}.key"] == plan.bits[f"{own}.value"]
    assert f"bits on average, {plan.nbytes:,} bytes, by {measure}" in str(plan)
    filbert.quantize(model, plan.bits, embed_bits=None)
    rows = filbert.quantization_report(model).rows
    assert {row.name: row.bits for row in rows} == plan.bits


def test_a_plan_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are optional")
    plan = plan_bits(build("distilbert"), samples(), avg_bits=3.0, measure="results")
    plan.plot(tmp_path / "plan.svg")
    drawn = (tmp_path / "plan.svg").read_text()
    assert drawn.count("<use ") >= len(plan.choices)  # a mark for every weight
    with pytest.raises(ValueError, match=r"supported|Format"):
        plan.plot(tmp_path / "plan.nothing")


def test_quantize_takes_a_budget():
    model, same = build("bert", **SIZE), build("bert", **SIZE)
    filbert.quantize(model, avg_bits=3.0, calibration=samples(), embed_bits=None)
    found = {row.name: row.bits for row in filbert.quantization_report(model)}
    assert found == plan_bits(same, samples(), avg_bits=3.0).bits
    with pytest.raises(ValueError, match="calibration: got no sample, and sensitivity"):
        filbert.quantize(same, avg_bits=3.0)


def test_a_budget_of_bytes():
    model = build("bert", **SIZE)
    plan = plan_bits(model, samples(), megabytes=0.03, options=(2, 4), measure="results")
    assert plan.nbytes <= 30_000
    assert set(plan.bits.values()) == {2, 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "need avg_bits or megabytes, and not both"),
        ({"avg_bits": 3, "megabytes": 1}, "need avg_bits or megabytes, and not both"),
        ({"avg_bits": 3, "measure": "fisher"}, "measure: got 'fisher', need one of"),
        ({"avg_bits": 3, "options": (2, 5)}, r"options: got \[5\], need some of 2, 3, 4, 6, 8"),
        ({"avg_bits": 1.5, "measure": "results"}, "need at least .*, 2 for each weight"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        plan_bits(build("bert", **SIZE), samples(), **settings)
