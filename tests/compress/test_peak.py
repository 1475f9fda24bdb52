"""The peak that is predicted is the one that PyTorch's allocator sees."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import filbert
from filbert.compress.lowrank import predicted_peak
from models import build, swapped

SIZES = {
    "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024,
    "max_position_embeddings": 600,
}  # fmt: skip


def measured(encoder, lengths):
    """The most that was given out at once while the layers ran, their input included."""
    batch = filbert.PackedBatch.from_lengths(lengths)
    rows = torch.randn(batch.num_rows, encoder.hidden_size).to(encoder.compute_dtype)
    nbytes = rows.numel() * rows.element_size()
    with torch.inference_mode():
        encoder.forward_packed(rows, batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            encoder.forward_packed(rows, batch)
    held = top = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top + nbytes


@pytest.mark.parametrize("low", [False, True], ids=["dense", "lowrank"])
def test_it_is_what_the_allocator_sees(low):
    model = build("bert", **SIZES)
    model = filbert.factorize(model, ranks=48) if low else filbert.convert(model)
    encoder, lengths = swapped(model), [512] * 5
    predicted, got = predicted_peak(model, sum(lengths)), measured(encoder, lengths)
    # The caller's rows are held beside the first layer's.
    own = sum(lengths) * 256 * 4
    assert predicted <= got <= 1.1 * predicted + own


def test_low_rank_needs_less_and_ranks_count():
    dense = predicted_peak(filbert.convert(build("bert", **SIZES)), 4096)
    ranks = {"re:query": 160, "re:.*": 48}
    model = filbert.factorize(build("bert", **SIZES), ranks=ranks)
    low = predicted_peak(model, 4096)
    assert low < 0.6 * dense
    assert predicted_peak(filbert.use_rank(model, 16), 4096) < low


def test_what_is_refused():
    with pytest.raises(ValueError, match="no packed encoder"):
        predicted_peak(build("bert"), 8)
