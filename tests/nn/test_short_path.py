"""A few rows pass the slots of a dense layer by; nobody can tell."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_packed_encoder import packed
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import filbert
from filbert.nn import EncoderLayer, PackedEncoder
from filbert.packed.batch import PackedBatch
from models import build
from tolerances import assert_exact


def rows_of(encoder: PackedEncoder, lengths: list[int]) -> tuple[torch.Tensor, PackedBatch]:
    batch = PackedBatch.from_lengths(lengths)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(batch.num_rows, encoder.hidden_size, generator=generator)
    return rows.to(encoder.compute_dtype), batch


def by_slots(layer: EncoderLayer, rows, batch):
    """The way through the modules."""
    filled = layer.fill_up(rows)
    return layer._finish(layer.attention(filled, batch), filled)


@pytest.mark.parametrize("lengths", [[1], [8], [5, 0, 9, 3]])
def test_the_short_path_gives_the_bits_of_the_slots(lengths):
    encoder = packed()
    for layer in encoder.layers:
        rows, batch = rows_of(encoder, lengths)
        got, _ = layer(rows, batch)
        assert layer._short_path() is not None
        assert_exact(got, by_slots(layer, rows, batch))


def few_bits(bits):
    model = build("bert", hidden_size=64, num_attention_heads=2, intermediate_size=128)
    filbert.quantize(model, bits)
    return model.encoder


@pytest.mark.parametrize("lengths", [[1], [8], [5, 0, 9, 3]])
@pytest.mark.parametrize("bits", [3, {"re:attention": 4, "re:.*": None}], ids=["all", "some"])
def test_layers_of_few_bits_have_one_too(bits, lengths):
    encoder = few_bits(bits)
    for layer in encoder.layers:
        rows, batch = rows_of(encoder, lengths)
        got, _ = layer(rows, batch)
        assert layer._short_path() is not None
        assert_exact(got, by_slots(layer, rows, batch))
    down = layer.feed_forward.down
    down.load_state_dict({name: t.flip(0) for name, t in down.state_dict().items()})
    again, _ = layer(rows, batch)
    assert_exact(again, by_slots(layer, rows, batch))
    assert got.numel() == 0 or not torch.equal(again, got)


def test_a_hook_sees_every_call():
    encoder = packed()
    layer = encoder.layers[0]
    rows, batch = rows_of(encoder, [4])
    layer(rows, batch)
    seen = []
    hook = layer.feed_forward.up.register_forward_hook(lambda *_: seen.append(1))
    layer(rows, batch)
    assert seen == [1]
    hook.remove()
    layer(rows, batch)
    assert seen == [1]


def test_a_hook_on_all_modules_sees_the_slots():
    layer = packed().layers[0]
    rows, batch = rows_of(packed(), [4])
    layer(rows, batch)
    seen = set()
    hook = register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        layer(rows, batch)
    finally:
        hook.remove()
    assert {layer.attention, layer.out, layer.feed_forward.up, layer.feed_forward.down} <= seen


def test_another_filling_and_loaded_weights_are_used():
    encoder = packed()
    layer = encoder.layers[0]
    rows, batch = rows_of(encoder, [4])
    before, _ = layer(rows, batch)
    state = {name: torch.flip(t, (0,)) if t.ndim else t for name, t in layer.state_dict().items()}
    layer.load_state_dict(state)
    after, _ = layer(rows, batch)
    assert not torch.equal(before, after)
    assert_exact(after, by_slots(layer, rows, batch))
    other = encoder.layers[1]
    for holder, name, part in (
        (layer, "feed_forward", copy.deepcopy(other.feed_forward)),
        (layer.feed_forward, "up", other.feed_forward.up),
    ):
        setattr(holder, name, part)
        again, _ = layer(rows, batch)
        assert_exact(again, by_slots(layer, rows, batch))
    down = layer.feed_forward.down
    down.load_state_dict({n: -t for n, t in down.state_dict().items()})
    last, _ = layer(rows, batch)
    assert not torch.equal(last, again)
    assert_exact(last, by_slots(layer, rows, batch))


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_path_of_its_own(travel):
    layer = packed().layers[0]
    rows, batch = rows_of(packed(), [4])
    expected, _ = layer(rows, batch)
    other = travel(layer)
    with torch.no_grad():
        layer.attn_norm.weight.zero_()
    assert_exact(other(rows, batch)[0], expected)
    assert other._short_path() is not layer._short_path()


def test_an_activation_of_the_model_has_none():
    layer = packed().layers[0]
    layer.feed_forward.activation = nn.Mish()
    assert layer.feed_forward.activation is not None
    layer.derive()
    assert layer._short_path() is None


@pytest.mark.parametrize("lengths", [[1], [8], [5, 0, 9, 3]])
def test_layers_of_low_rank_have_one_too(lengths):
    model = build("bert", hidden_size=64, num_attention_heads=2, intermediate_size=128)
    encoder = filbert.factorize(model, ranks=24).encoder
    for layer in encoder.layers:
        rows, batch = rows_of(encoder, lengths)
        got, _ = layer(rows, batch)
        assert layer._short_path() is not None
        assert_exact(got, by_slots(layer, rows, batch))
    for _, linear in layer.linears():
        linear.rank_in_use = 16
    again, _ = layer(rows, batch)
    assert_exact(again, by_slots(layer, rows, batch))
    assert not torch.equal(again, got)
