"""Converted and 1-bit models in another process, by every way there is to get them there."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
from typing import Any

import pytest
import torch

import filbert
from binarize_cases import own
from filbert.nn import PackedLinear
from models import MASKS, build, tokens
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
