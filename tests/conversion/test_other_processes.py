"""Converted and 1-bit models in another process, by every way there is to get them there."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import subprocess
import sys
from typing import Any

import pytest
import torch

import filbert
from binarize_cases import own
from filbert.nn import PackedLinear
from models import MASKS, build, tokens
from tiny_model import python_environment
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")


def models() -> dict[str, Any]:
    shared = filbert.convert(build("bert"))
    shared.share_memory()
    return {
        "float32": filbert.convert(build("bert")),
        "bfloat16": filbert.convert(build("bert", dtype=torch.bfloat16)),
        "head": filbert.convert(build("distilbert", "SequenceClassification")),
        "share_memory": shared,
        "low rank": filbert.factorize(build("bert"), ranks=9),
        "1-bit": filbert.binarize(own("bibert")),
    }


def linear() -> PackedLinear:
    return PackedLinear.from_linears(torch.nn.Linear(48, 32, device="cpu"))


def run(model: Any) -> torch.Tensor:
    mask = MASKS["right"]
    with torch.inference_mode():  # ids that the smallest vocabulary has too
        return model(tokens(mask) % 23, attention_mask=mask)[0].clone()


def answers(given: dict[str, Any], one: PackedLinear) -> dict[str, torch.Tensor]:
    found = {name: run(model) for name, model in given.items()}
    with torch.no_grad():
        found["PackedLinear"] = one(torch.ones(3, 48))
    return found


def in_child(given: dict[str, Any], one: PackedLinear, results: Any) -> None:
    """Bytes and not tensors come back, so that nothing else about sharing is tested here."""
    torch.set_num_threads(1)
    try:
        found = answers(given, one)
        states = {n: pickle.dumps(dict(m.state_dict())) for n, m in given.items()}
        results.put((pickle.dumps(found), states))
    except BaseException as error:
        results.put((repr(error), {}))
        raise


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_models_run_in_a_child(method):
    given, one = models(), linear()
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=in_child, args=(given, one, results), daemon=True)
    child.start()
    try:
        sent, states = results.get(timeout=120)
    except queue.Empty:
        pytest.fail(f"no answer; the child ended with {child.exitcode}")
    finally:
        child.join(5)
        child.kill()
    assert isinstance(sent, bytes), sent
    got = pickle.loads(sent)
    for name, expected in answers(given, one).items():
        assert_exact(got[name], expected)
    for name, state in states.items():
        ours = given[name].state_dict()
        assert list(pickle.loads(state)) == list(ours), name
        for key, value in pickle.loads(state).items():
            assert torch.equal(value, ours[key]), (name, key)


def test_a_model_goes_through_a_queue_to_a_child_that_runs():
    context = multiprocessing.get_context("fork")
    inbox, results = context.Queue(), context.Queue()
    child = context.Process(target=echo, args=(inbox, results), daemon=True)
    child.start()
    model = filbert.convert(build("bert"))
    expected = run(model)
    inbox.put(model)
    del model  # the child alone holds it from here on
    try:
        got = results.get(timeout=60)
    finally:
        child.join(5)
        child.kill()
    assert got == expected.numpy().tobytes()


def echo(inbox: Any, results: Any) -> None:
    torch.set_num_threads(1)
    results.put(run(inbox.get()).numpy().tobytes())


WITHOUT = """
import copy, torch, filbert
from transformers import BertConfig, BertModel

torch.manual_seed(0)
model = BertModel(BertConfig(
    vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=128, max_position_embeddings=40,
)).eval()
ids = torch.arange(14).view(2, 7)
assert "ops" in filbert._load.missing
makes = {
    "dense": filbert.convert, "few bits": lambda m: filbert.quantize(m, 8),
    "low rank": lambda m: filbert.factorize(m, ranks=16),
    "both": lambda m: filbert.factorize(m, ranks=16, factor_bits=8),
}
for name, make in makes.items():
    packed = make(copy.deepcopy(model))
    plain = filbert.revert(copy.deepcopy(packed))
    with torch.no_grad():
        got, right = (m(ids, attention_mask=torch.ones_like(ids))[0] for m in (packed, plain))
    print(name, float((got - right).abs().max()) < 0.05)
"""


def test_without_the_compiled_library_references_run(tmp_path):
    """Only a process of its own has no operators at all."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True,
        timeout=300, env=python_environment() | {"FILBERT_LIBRARY_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = ("dense", "few bits", "low rank", "both")
    assert done.stdout.splitlines() == [f"{name} True" for name in names]
