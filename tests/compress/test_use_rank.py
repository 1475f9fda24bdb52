"""A factorized model at smaller ranks."""

from __future__ import annotations

import copy

import pytest
import torch

import filbert
from filbert.nn import LinearLowRank
from models import build
from tolerances import assert_exact


def outputs(model):
    ids = torch.arange(40).view(2, 20) % 30
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


@pytest.fixture
def model():
    made = build("bert", hidden_size=64, num_attention_heads=2, intermediate_size=128)
    return made.eval()


def test_is_the_model_factorized_with_that_rank(model):
    # A value's bias that is folded into the output's goes through the whole rank.
    config = filbert.PackedEncoderConfig(fold_bias=False)
    smaller = filbert.factorize(copy.deepcopy(model), ranks=16, config=config)
    expected = outputs(smaller)
    larger = filbert.factorize(model, ranks=28, config=config)
    whole = outputs(larger)
    assert filbert.use_rank(larger, 16) is larger
    torch.testing.assert_close(outputs(larger), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(outputs(larger), whole)
    filbert.use_rank(larger, None)
    assert_exact(outputs(larger), whole)


def test_shares_are_rounded_up_to_multiples_of_16(model):
    filbert.factorize(model, ranks={"re:attention": 40, "re:.*": 20})
    for share, ranks in ((0.5, {32, 16}), (1.0, {40, 20}), (0.01, {16}), (100, {40, 20}), (5, {5})):
        filbert.use_rank(model, share)
        used = {m.rank_in_use for m in model.modules() if isinstance(m, LinearLowRank)}
        assert used == ranks, share


def test_what_files_and_revert_take_stays_the_whole(model):
    filbert.factorize(model, ranks=40)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    filbert.use_rank(model, 0.3)
    for name, t in model.state_dict().items():
        assert_exact(t, before[name])


def test_refuses_what_means_nothing(model):
    with pytest.raises(ValueError, match="no weight of low rank"):
        filbert.use_rank(model, 0.5)
    filbert.factorize(model, ranks=16)
    for rank in (0, -3, 0.0, 1.5):
        with pytest.raises(ValueError, match="rank: got"):
            filbert.use_rank(model, rank)
