"""Fine-tuning of factors: what it computes, what it trains, and what is packed."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import filbert
from cases import normal
from filbert.compress.lowrank import Factors, FactorTraining
from filbert.compress.lowrank.training import in_order
from models import MASKS, build, run, swapped, tokens
from tolerances import assert_exact

EXAMPLES = Path(__file__).parents[2] / "examples"
KEPT = MASKS["right"] == 1


def hidden(model):
    return model(tokens(MASKS["right"]), attention_mask=MASKS["right"])[0]


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_training_computes_what_factorize_makes_and_what_is_packed(family):
    model = build(family, attention="eager")
    expected = run(filbert.factorize(copy.deepcopy(model), ranks=9))[KEPT]
    training = FactorTraining(model, ranks=9)
    with torch.no_grad():
        simulated = hidden(model)[KEPT]
    torch.testing.assert_close(simulated, expected, rtol=1e-4, atol=1e-4)
    packed = training.finish()
    assert packed is model
    torch.testing.assert_close(run(packed)[KEPT], expected, rtol=1e-4, atol=1e-4)
    assert {row.rank for row in filbert.factorization_report(packed).rows} == {9}
    assert swapped(packed).compressed is not None


def test_training_trains_the_factors():
    teacher = build("bert")
    student = copy.deepcopy(teacher)
    training = FactorTraining(student, ranks={"re:layer.0": None, "re:.*": 8})
    right = hidden(teacher).detach()
    query, key = (getattr(student.encoder.layer[1].attention.self, n) for n in ("query", "key"))
    assert query.a is key.a
    assert type(student.encoder.layer[0].output.dense) is nn.Linear
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    student.eval()
    for _ in range(30):
        loss = (hidden(student) - right).square()[KEPT].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        trained = hidden(student)[KEPT]
    packed = training.finish()
    torch.testing.assert_close(run(packed)[KEPT], trained, rtol=1e-3, atol=1e-3)
    assert all(type(m) is not type(query) for m in packed.modules())


def test_factors_come_back_in_the_order_of_their_worth():
    given = Factors(normal(6, 40), normal(30, 6, seed=1))
    made = in_order(given)
    torch.testing.assert_close(made.weight, given.weight, rtol=1e-4, atol=1e-4)
    best = torch.linalg.svd(given.weight)
    for rank in (1, 3, 5):
        error = float((made.cut(rank).weight - given.weight).square().sum())
        assert error == pytest.approx(float(best.S[rank:].square().sum()), rel=1e-3, abs=1e-3)


def test_cancelled_training_leaves_linear_layers():
    model = build("bert")
    names = [name for name, _ in model.named_parameters()]
    training = FactorTraining(model, ranks=8)
    with torch.no_grad():
        expected = hidden(model)
    training.cancel()
    assert [name for name, _ in model.named_parameters()] == names
    with torch.no_grad():
        torch.testing.assert_close(hidden(model), expected, rtol=1e-4, atol=1e-4)


def test_what_is_refused_changes_nothing():
    model = build("bert")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for options, said in (
        ({}, "budget: need one of"), ({"ranks": 0}, "ranks: got 0"),
        ({"ranks": {"nothing": 8, "re:.*": None}}, "leaves every weight as it is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            FactorTraining(model, **options)
    for name, t in model.state_dict().items():
        assert_exact(t, before[name])


def test_the_example(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("lowrank", EXAMPLES / "finetune_low_rank.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--smoke"]) == 0
    assert "trained, packed" in capsys.readouterr().out
