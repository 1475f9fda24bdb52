"""Errors of a weight's outputs that count by what they cost."""

from __future__ import annotations

import copy

import pytest
import torch

import filbert
from filbert.compress.calibration import caller_of
from filbert.compress.lowrank.fisher import output_fisher
from models import build


def samples(model, count=6):
    generator = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(5, model.config.vocab_size, (1, 7), generator=generator)}
        for _ in range(count)
    ]


def few_outputs(result):
    """A loss that two of the model's outputs make."""
    return result.last_hidden_state[..., :2].square().sum()


def test_it_is_the_squares_of_gradients():
    model = build("bert")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    linear = model.encoder.layer[1].output.dense
    given = samples(model, 2)
    (found,) = output_fisher([linear], given, caller_of(model, None), few_outputs).values()
    expected = torch.zeros_like(found)
    linear.weight.requires_grad_(True)
    for one in given:
        few_outputs(model(**one)).backward()
        expected += linear.weight.grad.double().square().sum(1)
        linear.weight.grad = None
    torch.testing.assert_close(found, expected)
    linear.weight.requires_grad_(False)
    output_fisher([linear], given, caller_of(model, None), few_outputs)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_factors_keep_what_the_loss_minds():
    model = build("bert")
    given = samples(model, 20)

    def lost(**options) -> float:
        made = filbert.factorize(copy.deepcopy(model), ranks=6, calibration=given, **options)
        total = 0.0
        with torch.no_grad():
            for one in samples(model, 30)[20:]:
                ours, right = (m(**one).last_hidden_state[..., :2] for m in (made, model))
                total += float((ours - right).square().sum())
        return total

    assert lost(loss=few_outputs) < lost()


def test_what_is_refused():
    model = build("bert")
    with pytest.raises(ValueError, match="loss: got one without calibration"):
        filbert.factorize(model, ranks=6, loss=few_outputs)
    weight = model.encoder.layer[0].output.dense.weight
    with pytest.raises(ValueError, match="does not depend on every layer"):
        filbert.factorize(model, ranks=6, calibration=samples(model), loss=lambda _: weight.sum())
