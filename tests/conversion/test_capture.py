"""The runner of CUDA graphs: which graph, what it is given, what comes back.

On the host a graph is the same step run again on the same static buffers; on a GPU it is a graph.
"""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import filbert
from conftest import BACKENDS
from filbert import capture as capture_model
from filbert import convert, embed
from filbert.graphs import CapturedEncoder, prove
from models import FAMILIES, MASKS, build, swapped, tokens
from tolerances import assert_exact

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.parametrize(
        "backend", [b for b in BACKENDS if b in ("hostcuda-0", "cuda")], indirect=True
    ),
]


class Again:
    """A captured step on the host: replay runs it again, into the same rows."""

    def __init__(self, step) -> None:
        self.step = step
        self.rows = step().clone()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.rows.fill_(float("nan"))
        self.rows.copy_(self.step())


def converted(family, device, dtype=torch.float16, **settings):
    with torch.device("cpu"):
        return convert(build(family, dtype=dtype, **settings).to(device))


def runner_of(model, device, buckets=(4, 16, 32), max_sequences=4):
    if device.type == "cuda":
        return capture_model(model, buckets, max_sequences=max_sequences)
    runner = CapturedEncoder(model, buckets, max_sequences, Again)
    prove(runner)
    return runner


def plain(model, ids, mask, device, **inputs):
    rows, batch = embed(model, ids.to(device), mask.to(device), "none", **inputs)
    return batch.unpack(rows)


def takes_positions(family, model):
    owner = getattr(model, model.base_model_prefix, model)
    return "position_ids" in inspect.signature(owner.embeddings.forward).parameters


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gives_what_the_model_gives(gpu, family, mask):
    model = converted(family, gpu)
    if not takes_positions(family, model):  # DistilBERT before transformers 5
        with pytest.raises(ValueError, match="without position_ids"):
            runner_of(model, gpu)
        return
    runner = runner_of(model, gpu)
    ids, mask = tokens(MASKS[mask]), MASKS[mask]
    ours, want = runner(ids, mask), plain(model, ids, mask, gpu)
    assert ours.dtype == torch.float16
    assert not ours.is_inference()  # a trained probe may take it
    torch.testing.assert_close(ours, want, rtol=0.01, atol=0.01)
    assert_exact(ours[mask == 0], torch.zeros_like(ours[mask == 0]))


@pytest.mark.parametrize("lengths", [[9, 3], [1], [4], [5], [16], [3, 0, 2, 1], [30], [0, 0]])
def test_one_capture_serves_all_lengths(gpu, lengths):
    model = converted("bert", gpu)
    runner = runner_of(model, gpu)
    mask = (torch.arange(max(1, *lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = tokens(mask)
    for _ in range(2):  # what the last call left behind does not matter
        ours = runner(ids, mask)
        torch.testing.assert_close(ours, plain(model, ids, mask, gpu), rtol=0.01, atol=0.01)
        runner(tokens(torch.ones(2, 15)), torch.ones(2, 15).long())


def test_heads_of_128(gpu):
    """Their kernels need more shared memory than every kernel may have: it is asked for at each
    launch, under capture too."""
    model = converted("bert", gpu, hidden_size=256, num_attention_heads=2)
    runner = runner_of(model, gpu, buckets=(32,))
    mask = (torch.arange(20) < torch.tensor([20, 7])[:, None]).long()
    ids = tokens(mask)
    ours, want = runner(ids, mask), plain(model, ids, mask, gpu)
    torch.testing.assert_close(ours, want, rtol=0.01, atol=0.01)


def test_takes_the_smallest_bucket_and_does_without_where_none_fits(gpu):
    model = converted("bert", gpu)
    runner = runner_of(model, gpu)
    assert [runner.bucket_of(n) for n in (0, 1, 4, 5, 16, 17, 32, 33)] == [
        4,
        4,
        4,
        16,
        16,
        32,
        32,
        None,
    ]
    assert runner.bucket_of(8, sequences=4) == 16
    assert runner.bucket_of(8, sequences=5) is None
    for shape in ((2, 20), (5, 2)):  # too many tokens, too many texts
        mask = torch.ones(shape, dtype=torch.long)
        ids = tokens(mask)
        assert_exact(runner(ids, mask), plain(model, ids, mask, gpu))
        for pooling in ("mean", "cls"):
            want = embed(model, ids.to(gpu), mask.to(gpu), pooling)
            assert_exact(runner(ids, mask, pooling=pooling), want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("mask", MASKS)
def test_pooling(gpu, mask, pooling, normalize):
    model = converted("roberta", gpu)
    runner = runner_of(model, gpu)
    ids, mask = tokens(MASKS[mask]), MASKS[mask]
    ours = runner(ids, mask, pooling=pooling, normalize=normalize)
    want = embed(model, ids.to(gpu), mask.to(gpu), pooling, normalize)
    torch.testing.assert_close(ours, want, rtol=0.02, atol=0.02)


def test_token_types_and_inputs_on_the_device(gpu):
    model = converted("bert", gpu)
    runner = runner_of(model, gpu)
    mask = MASKS["left"]
    ids, types = tokens(mask), tokens(mask) % 2
    want = plain(model, ids, mask, gpu, token_type_ids=types.to(gpu))
    torch.testing.assert_close(runner(ids, mask, types), want, rtol=0.01, atol=0.01)
    there = (t.to(gpu) for t in (ids, mask, types))
    assert_exact(runner(*there), runner(ids, mask, types))
    assert not torch.equal(runner(ids, mask), runner(ids, mask, types))
    assert_exact(runner(ids), runner(ids, torch.ones_like(ids)))


def test_results_outlive_the_next_call(gpu):
    runner = runner_of(converted("bert", gpu), gpu)
    mask = torch.ones(1, 6, dtype=torch.long)
    ids = tokens(mask)
    first = runner(ids, mask)
    kept = first.clone()
    runner(ids.flip(1), mask)
    assert_exact(first, kept)


def test_a_model_packed_anew_is_noticed(gpu):
    model = converted("bert", gpu)
    runner = runner_of(model, gpu)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="packed anew"):
        runner(torch.ones(1, 3, dtype=torch.long))


def test_a_weight_written_in_place_is_noticed(gpu):
    model = converted("bert", gpu)
    runner = runner_of(model, gpu, buckets=(16,))
    with torch.no_grad():
        next(swapped(model).parameters()).zero_()
    with pytest.raises(RuntimeError, match=r"written in place.*load_state_dict"):
        runner(tokens(MASKS["none"])[:1])


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_runner_cannot_be_copied_or_sent(gpu, copy_of):
    runner = runner_of(converted("bert", gpu), gpu, buckets=(16,))
    with pytest.raises(TypeError, match=r"CUDA graphs belong to this process.*filbert\.capture"):
        copy_of(runner)


def test_replaced_embeddings_are_noticed(gpu):
    model = converted("bert", gpu)
    runner = runner_of(model, gpu)
    model.resize_token_embeddings(120, mean_resizing=False)
    with pytest.raises(RuntimeError, match="moved since"):
        runner(torch.ones(1, 3, dtype=torch.long))


def test_what_is_in_no_table_is_refused(gpu):
    """A graph would read past the end of the table."""
    runner = runner_of(converted("bert", gpu), gpu, buckets=(64,))
    ids = torch.ones(1, 50, dtype=torch.long)
    with pytest.raises(ValueError, match="word_embeddings: got indices from 1 to 97, need 0 to 96"):
        runner(torch.tensor([[1, 97]]))
    with pytest.raises(
        ValueError, match="position_embeddings: got indices from 0 to 49, need 0 to 39"
    ):
        runner(ids)
    with pytest.raises(
        ValueError, match="token_type_embeddings: got indices from 0 to 7, need 0 to"
    ):
        runner(ids[:, :9], token_type_ids=torch.full((1, 9), 7) * (torch.arange(9) > 3))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
def test_no_tokens_at_all(gpu, shape):
    runner = runner_of(converted("bert", gpu), gpu)
    ids = torch.ones(shape, dtype=torch.long)
    assert runner(ids).shape == (*shape, 48)
    for pooling in ("mean", "cls"):
        pooled = runner(ids, pooling=pooling)
        assert_exact(pooled, torch.zeros_like(pooled))
        assert pooled.shape == (shape[0], 48)


def test_nothing_in_a_step_waits_for_the_device(gpu):
    """Under fake tensors a read by the host is an error, and so it would be under capture. Of what
    is captured nothing may depend on values: neither shapes nor the choice of a kernel."""
    if gpu.type == "cuda":
        pytest.skip("on a GPU the other tests capture it for real")
    for family in FAMILIES:
        model = converted(family, gpu)
        if not takes_positions(family, model):
            continue
        runner = CapturedEncoder(model, (8,), 4, Again)
        with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
            rows = runner._step(8)
        assert rows.shape == (8, swapped(model).hidden_size)
    with pytest.raises(DataDependentOutputException), FakeTensorMode() as mode:
        bool(mode.from_tensor(torch.ones(2)).any())  # such a read is an error


def test_refuses(gpu):
    model = converted("bert", gpu)
    with pytest.raises(ValueError, match=r"need token counts.*1 or more"):
        capture_model(model, ())
    with pytest.raises(ValueError, match=r"need token counts.*1 or more"):
        capture_model(model, (0, 4))
    with torch.device("cpu"), pytest.raises(ValueError, match=r"need one; try filbert.convert"):
        capture_model(build("bert"))
    if gpu.type == "cpu":
        with pytest.raises(ValueError, match=r"got one on cpu, need a CUDA device"):
            capture_model(model)
    runner = runner_of(model, gpu)
    with pytest.raises(ValueError, match=r"input_ids: got shape \(3,\)"):
        runner(torch.ones(3).long())
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        runner(torch.ones(1, 3).long(), torch.ones(1, 4))
    with pytest.raises(ValueError, match="pooling: got 'max'"):
        runner(torch.ones(1, 3).long(), pooling="max")


def test_a_wrong_graph_is_not_returned(gpu):
    """A step that computes something else is found before anyone uses it."""
    model = converted("bert", gpu)
    runner = runner_of(model, gpu, max_sequences=3)
    runner._embed_rows.positions = torch.nn.Embedding(3, 3, padding_idx=1, device="cpu")
    with pytest.raises(RuntimeError, match="differs from the model's"):
        prove(runner)
    assert "buckets=(4, 16, 32)" in repr(runner)
    assert filbert.capture is capture_model
