"""What cannot be recorded says why and what to do, whoever records."""

from __future__ import annotations

import pytest
import torch

from filbert.conversion.in_place import convert, revert
from filbert.packed.batch import PackedBatch
from models import MASKS, build, run, tokens
from tolerances import assert_exact

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # transformers' own
]

MASK = MASKS["right"]
WHY = r"depends on the values of the mask[\s\S]*filbert\.revert\(model\)"
INPUTS = {"input_ids": tokens(MASK), "attention_mask": MASK}


class Tuple(torch.nn.Module):
    """A model with tensors in and out, as tracers want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask)[0]


RECORDERS = {
    "trace": lambda model: torch.jit.trace(model, (tokens(MASK), MASK)),
    "export": lambda model: torch.export.export(model, (tokens(MASK), MASK)),
    "strict export": lambda model: torch.export.export(model, (tokens(MASK), MASK), strict=True),
    "fullgraph": lambda model: torch.compile(model, fullgraph=True, backend="eager")(**INPUTS),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("how", RECORDERS)
def test_a_converted_model_says_why_it_cannot_be_recorded(how, grad):
    torch._dynamo.reset()
    model = Tuple(convert(build("bert")))
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=WHY):
        RECORDERS[how](model)
    torch._dynamo.reset()
    answer = run(model.model)
    assert_exact(run(torch.compile(model.model, backend="eager")), answer)


@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_reverted_model_can_be_recorded(how):
    model = Tuple(revert(convert(build("bert")))).requires_grad_(False)
    assert RECORDERS[how](model) is not None


@pytest.mark.parametrize("mask", ["right", "none"])
def test_a_recorded_batch_would_keep_its_rows(mask):
    """Also a mask that keeps everything: another call's would not."""

    def indices(mask):
        return PackedBatch.from_mask(mask).indices

    with pytest.raises(NotImplementedError, match=r"PackedBatch cannot be recorded by torch.jit"):
        torch.jit.trace(indices, MASKS[mask])
    assert indices(MASKS[mask]).numel() == int(MASKS[mask].sum())
