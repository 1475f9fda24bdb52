"""Fine-tuning with weights of few bits: what it computes, what it trains, and what is packed."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import filbert
from cases import normal
from filbert import PackedEncoderConfig
from filbert.compress.quantize import StraightThrough, quantization_report
from filbert.nn import EmbeddingGrouped
from models import MASKS, build, run, swapped, tokens
from tolerances import assert_exact

EXAMPLES = Path(__file__).parents[2] / "examples"


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_training_computes_what_is_packed(family, bits):
    model = build(family, attention="eager")
    simulated = StraightThrough(model, bits)
    with torch.no_grad():
        expected = model(tokens(MASKS["right"]), attention_mask=MASKS["right"])[0]
    # Folded biases would move the codes of the rows that they are added to.
    packed = simulated.finish(PackedEncoderConfig(fold_bias=False, check=False))
    assert packed is model
    kept = MASKS["right"] == 1
    # A number that lies between two codes of a row may go to either.
    got = run(packed)[kept]
    assert float((got - expected[kept]).abs().max()) < 0.01 * float(expected[kept].abs().max())
    assert any(isinstance(m, EmbeddingGrouped) for m in packed.modules())
    assert swapped(packed).compressed is not None
    report = quantization_report(packed)
    assert report.method == "training"
    assert {row.bits for row in report if "mbed" not in row.name} == {bits}


def test_training_trains_the_floats_behind_the_codes():
    teacher = build("bert")
    student = copy.deepcopy(teacher)
    names = [name for name, _ in student.named_parameters()]
    training = StraightThrough(student, 2, refresh=5)
    right = run(teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        student.train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        ours = student(tokens(MASKS["right"]), attention_mask=MASKS["right"])[0]
        loss = (ours - right).square()[MASKS["right"] == 1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    weight = student.encoder.layer[0].output.dense.parametrizations["weight"].original
    assert float(weight.grad.abs().max()) > 0
    codes = {
        name: m.weight.detach().clone()
        for name, m in student.named_modules()
        if isinstance(m, nn.Linear) and "encoder" in name
    }
    packed = training.finish()
    for name, numbers in codes.items():
        assert_exact(packed.state_dict()[f"{name}.weight"], numbers)
    assert [name for name, _ in filbert.revert(packed).named_parameters()] == names


def test_gradients_stop_at_the_ends_of_the_range():
    model = build("bert")
    linear = model.encoder.layer[0].attention.self.query
    with torch.no_grad():
        linear.weight.copy_(normal(*linear.weight.shape))
        linear.weight[0, 0] = 40.0  # far out: the range with the least squared error leaves it out
    StraightThrough(model, 2, group=None)
    linear.weight.sum().backward()
    grad = linear.parametrizations["weight"].original.grad
    assert float(grad[0, 0]) == 0.0 or float(linear.weight[0, 0]) > 20
    assert set(grad.unique().tolist()) <= {0.0, 1.0}
    assert 0.5 < float(grad.mean()) < 1.0


def test_cancel_gives_everything_back():
    model = build("bert")
    before, types = state(model), {n: type(m) for n, m in model.named_modules()}
    training = StraightThrough(model, {"re:attention": 3})
    assert_exact(
        model.encoder.layer[0].output.dense.weight, before["encoder.layer.0.output.dense.weight"]
    )
    training.cancel()
    training.cancel()
    after = state(model)
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert list(after) == list(before)
    for name, t in after.items():
        assert_exact(t, before[name])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_is_refused():
    model = build("bert")
    with pytest.raises(ValueError, match="refresh: got 0"):
        StraightThrough(model, 2, refresh=0)
    with pytest.raises(ValueError, match="names no weight"):
        StraightThrough(model, {"nothing": 2})
    with pytest.raises(ValueError, match="got 5, need one of"):
        StraightThrough(model, 5)
    assert type(model.encoder.layer[0].output.dense) is nn.Linear


def test_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("finetune", EXAMPLES / "finetune_few_bits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--smoke", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "trained, packed" in said
    assert (tmp_path / "out" / "model.safetensors").exists()
