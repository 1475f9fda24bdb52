"""How codes are chosen, and models with weights of a few bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import filbert
from cases import normal
from filbert import EncoderPlan, LayerPlan, PackedBatch
from filbert.compress.calibration import Moments, caller_of, input_moments
from filbert.compress.quantize import gptq, half_quadratic, quantization_report, round_to_nearest
from filbert.compress.quantize.rounding import most_multiplier, steps_of
from filbert.nn import EmbeddingGrouped, GroupedWeight, LinearGrouped, PackedEncoder, load_encoder
from filbert.ops import quantize_rows
from filbert.packed.codes import QuantizedRows
from models import build
from tolerances import assert_cosine, assert_exact

BITS = (2, 3, 4, 6, 8)
all_bits = pytest.mark.parametrize("bits", BITS)


def error_of(weight, quantized):
    return float((quantized.dequantize() - weight).norm() / weight.norm())


@all_bits
@pytest.mark.parametrize("group", [None, 32, 64])
def test_rounding_to_nearest(bits, group):
    weight = normal(24, 128) * normal(24, 1, seed=1).exp()
    whole = round_to_nearest(weight, bits, group, clip=False)
    clipped = round_to_nearest(weight, bits, group)
    assert (whole.bits, whole.outputs, whole.inputs) == (bits, 24, 128)
    assert whole.groups == (1 if group is None else 128 // group)
    # No number is further from its own than half a step, but at the end of the shorter side.
    steps = steps_of(weight, bits, group, clip=False).of_groups().abs()
    step = steps.repeat_interleave(128 // steps.shape[1], 1)
    beyond = (whole.dequantize() - weight).abs() / step
    assert float(beyond.max()) <= (0.51 if bits > 2 else 1.01)
    assert error_of(weight, clipped) <= error_of(weight, whole) * 1.001
    if bits < 4 and group is None:
        assert error_of(weight, clipped) < 0.9 * error_of(weight, whole)


@all_bits
def test_multipliers_never_let_a_sum_overflow(bits):
    for inputs in (768, 3072, 4096):
        most = most_multiplier(inputs, bits)
        assert inputs * 255 * (1 << (bits - 1)) * most < 2**31
        assert most * (1 << (bits - 1)) <= 127 or bits > 4  # products are bytes
        assert bits <= 4 or most == 255 or inputs * 255 * (most + 1) << (bits - 1) >= 2**31
    weight = torch.ones(3, 4096)
    assert_exact(round_to_nearest(weight, 8, 32).totals() != 0, torch.ones(3, dtype=torch.bool))


def test_awkward_weights():
    weight = normal(20, 64)
    weight[0], weight[1], weight[2, 5] = 0, 1e-39, 1e6
    for bits in BITS:
        for group in (None, 32):
            for made in (
                round_to_nearest(weight, bits, group),
                half_quadratic(weight, bits, group),
            ):
                back = made.dequantize()
                assert bool(back.isfinite().all())
                assert_exact(back[0], torch.zeros(64))
    with pytest.raises(ValueError, match="group: got 64 for 96 inputs, need one of 32, 64, 128"):
        round_to_nearest(normal(4, 96), 4, 64)
    with pytest.raises(ValueError, match="bits: got 5, need one of 2, 3, 4, 6, 8"):
        round_to_nearest(weight, 5)
    with pytest.raises(ValueError, match=r"weight: got \(2, 3\), need .* finite"):
        round_to_nearest(torch.full((2, 3), torch.nan), 4)


@pytest.mark.parametrize("group", [None, 32])
def test_half_quadratic_forgives_outliers(group):
    """Its own measure is no worse than that of the best squares."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    weight[torch.rand(32, 128, generator=generator) < 0.01] *= 12
    ours, squares = half_quadratic(weight, 3, group), round_to_nearest(weight, 3, group)

    def cost(made):
        return float((made.dequantize() - weight).abs().pow(0.7).sum())

    assert cost(ours) <= cost(squares) * 1.001
    assert cost(half_quadratic(weight, 3)) < 0.97 * cost(round_to_nearest(weight, 3, clip=False))


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_makes_results_better_than_rounding(bits, group):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator) * torch.linspace(0.1, 2, 96)
    rows = torch.randn(400, 96, generator=generator) @ mix
    weight = torch.randn(40, 96, generator=generator)
    products = rows.T @ rows

    def loss(made):
        return float((rows @ (made.dequantize() - weight).T).square().mean())

    nearest = loss(round_to_nearest(weight, bits, group))
    once, often = (loss(gptq(weight, products, bits, group, passes=n)) for n in (0, 4))
    assert once < 0.8 * nearest
    assert often < once
    with pytest.raises(ValueError, match=r"moments: got \(96, 95\), need \[96, 96\]"):
        gptq(weight, products[:, :95], bits)


def test_gptq_of_inputs_that_were_never_seen():
    weight = normal(16, 64)
    made = gptq(weight, torch.zeros(64, 64), 4)
    assert error_of(weight, made) < 0.2
    moments = torch.zeros(64, 64)
    moments[3, 3] = 7
    assert bool(gptq(weight, moments, 4, 32).dequantize().isfinite().all())


@all_bits
def test_weights_are_joined_and_parted(bits):
    for sizes in ((32, 16, 48), (17, 30)):
        parts = [round_to_nearest(normal(n, 64, seed=i), bits, 32) for i, n in enumerate(sizes)]
        whole = GroupedWeight.cat(parts)
        assert_exact(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
        for ours, theirs in zip(whole.split(sizes), parts, strict=True):
            assert_exact(ours.dequantize(), theirs.dequantize())
            assert_exact(ours.totals(), theirs.totals())
        if sizes[0] % 16 == 0:  # nothing was copied
            first = whole.split(sizes)[0]
            assert first.packed.data_ptr() == whole.packed.data_ptr()
    with pytest.raises(ValueError, match=r"weights over one input: got .* need the same for all"):
        GroupedWeight.cat([parts[0], round_to_nearest(normal(16, 64), bits)])


def test_weights_that_do_not_fit():
    codes, scale = torch.zeros(4, 96, dtype=torch.uint8), torch.ones(4)
    bad = torch.ones(4, 4, dtype=torch.uint8)  # groups of 24
    with pytest.raises(ValueError, match=r"multiplier: got \(4, 4\) .* need uint8 \[4, G\]"):
        GroupedWeight.from_codes(codes, 4, scale, bad)
    with pytest.raises(ValueError, match=r"zero: got 16, need less than 2\*\*4"):
        GroupedWeight.from_codes(codes, 4, scale, None, torch.full((4, 3), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"scale: got \(3,\), need \[4\] finite"):
        GroupedWeight.from_codes(codes, 4, scale[:3])


def offset_weight():
    codes = torch.randint(0, 16, (40, 96), generator=torch.Generator().manual_seed(1))
    zero = torch.randint(0, 16, (40, 3), generator=torch.Generator().manual_seed(2))
    multiplier = torch.randint(1, 256, (40, 3), generator=torch.Generator().manual_seed(3))
    return GroupedWeight.from_codes(
        codes.to(torch.uint8), 4, normal(40) / 500, multiplier.to(torch.uint8),
        zero.to(torch.uint8),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["row", "groups", "offsets"])
def test_the_module_multiplies_with_the_dequantized_weight(kind):
    weight = {
        "row": lambda: round_to_nearest(normal(40, 96), 3),
        "groups": lambda: round_to_nearest(normal(40, 96), 6, 32),
        "offsets": offset_weight,
    }[kind]()
    layer = LinearGrouped([weight], normal(40, seed=5))
    x = normal(9, 96, seed=6)
    rows = QuantizedRows(*quantize_rows(x))
    expected = rows.dequantize(torch.float64) @ weight.dequantize(torch.float64).T + layer.bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert_exact(layer(rows), layer(x))
    codes = layer.forward_codes(x)
    assert float((codes.dequantize() - layer(x)).abs().max()) <= float(codes.scale.max())
    (back,) = layer.dense_weights()
    assert_exact(back, weight.dequantize())
    assert_exact(pickle.loads(pickle.dumps(layer))(x), layer(x))
    other = LinearGrouped.from_config(layer.config())
    other.load_state_dict(layer.state_dict())
    assert_exact(other(x), layer(x))
    assert layer.double()(x).dtype == torch.float32


def test_moments_leave_padding_out_and_share_inputs():
    model = build("bert")
    layers = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)]
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in id_rows()]
    found = input_moments(layers, samples, caller_of(model, None))
    first = model.encoder.layer[0].attention.self
    assert found[first.query].count == sum(ids.numel() for ids in id_rows())
    assert found[first.query].products is found[first.key].products or torch.equal(
        found[first.query].products, found[first.key].products
    )
    with torch.no_grad():
        rows = torch.cat([model.embeddings(ids)[0] for ids in id_rows()])
    torch.testing.assert_close(
        found[first.query].products, (rows.T @ rows).double(), rtol=1e-4, atol=1e-4
    )
    exact = (rows - rows.mean(0)).double()
    assert torch.allclose(found[first.query].centred, exact.T @ exact, atol=1e-3)
    with pytest.raises(ValueError, match="calibration: got no sample"):
        input_moments(layers, [], caller_of(model, None))
    with pytest.raises(ValueError, match="1 of 1 layers saw no row"):
        input_moments([nn.Linear(2, 2)], samples, caller_of(model, None))
    with pytest.raises(ValueError, match="got texts for a model without a tokenizer"):
        caller_of(model, None)("a text")


def id_rows():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(5, 60, (1, n), generator=generator) for n in (3, 9, 6, 12)]


def samples():
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in id_rows()]


def outputs(model):
    with torch.inference_mode():
        return torch.cat([model(**sample)[0][0] for sample in samples()])


SIZE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
SIZES = {"distilbert": {"dim": 64, "n_heads": 2, "hidden_dim": 128}}


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_a_model_with_8_bits_is_nearly_the_same(family):
    model = build(family, **SIZES.get(family, SIZE))
    expected = outputs(model)
    assert filbert.quantize(model, 8, embed_bits=None) is model
    assert_cosine(outputs(model), expected.double(), 0.9995)
    text = str(filbert.report(model))
    assert "linear_grouped 8 bits + gelu" in text
    assert "LinearGrouped" in text
    report = quantization_report(model)
    assert len(report) == 12
    assert max(row.error for row in report) < 0.01
    assert "12 weights by mse" in str(report)


@pytest.mark.parametrize("method", ["nearest", "mse", "hqq", "gptq"])
def test_methods(method):
    model = build("bert", **SIZE)
    expected = outputs(model)
    calibration = samples() if method == "gptq" else None
    filbert.quantize(model, 4, embed_bits=None, method=method, calibration=calibration)
    assert_cosine(outputs(model), expected.double(), 0.97 if method == "gptq" else 0.95)
    rows = quantization_report(model).rows
    assert all((row.of_results is not None) == (method == "gptq") for row in rows)
    assert {row.group for row in rows} == {64}


def test_the_packed_model_computes_what_the_reverted_one_does():
    """But for the codes of rows: the model's weights are those the codes stand for."""
    model = build("bert", **SIZE)
    filbert.quantize(model, {"re:attention": 4, "re:.*": 6}, calibration=samples())
    packed = outputs(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    filbert.revert(model)
    assert_cosine(packed, outputs(model).double(), 0.9995)
    for name, t in model.state_dict().items():
        assert_exact(t, state[name])


def test_some_weights_stay_as_they_are():
    model = build("bert", **SIZE)
    kept = model.encoder.layer[0].output.dense.weight.detach().clone()
    filbert.quantize(model, {"re:layer.0..*(intermediate|output.dense)": None, "re:.*": 4})
    names = {row.name for row in quantization_report(model)}
    assert "encoder.layer.0.intermediate.dense" not in names
    assert "encoder.layer.1.intermediate.dense" in names
    layers = model.encoder.layers
    assert type(layers[0].feed_forward.up).__name__ == "PackedLinear"
    assert type(layers[1].feed_forward.up).__name__ == "LinearGrouped"
    filbert.revert(model)
    assert_exact(model.encoder.layer[0].output.dense.weight, kept)


def test_copies_and_other_dtypes():
    model = build("bert", **SIZE)
    filbert.quantize(model, 3)
    expected = outputs(model)
    assert_exact(outputs(copy.deepcopy(model)), expected)
    assert_exact(outputs(pickle.loads(pickle.dumps(model))), expected)
    assert_cosine(outputs(model.bfloat16()).float(), expected.double(), 0.995)
    assert type(model.encoder.layers[0].out).__name__ == "LinearGrouped"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_embedding_tables(family, bits):
    model = build(family, **SIZE)
    before = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    expected = outputs(model)
    filbert.quantize(model, 8, embed_bits=bits)
    tables = {n: m for n, m in model.named_modules() if isinstance(m, EmbeddingGrouped)}
    assert set(tables) == set(before)
    assert_cosine(outputs(model), expected.double(), 0.999 if bits == 8 else 0.97)
    rows = {row.name: row for row in quantization_report(model)}
    for name, table in before.items():
        assert tables[name].bits == bits
        assert rows[name].error < (0.01 if bits == 8 else 0.15)
        step = table.abs().amax(1, keepdim=True) / (127 if bits == 8 else 7)
        assert bool(((tables[name].weight - table).abs() <= 0.5001 * step).all())
    assert f"embedding_grouped {bits} bits" in str(filbert.report(model))
    after = outputs(model)
    assert_exact(outputs(copy.deepcopy(model)), after)
    model.load_state_dict(model.state_dict())
    assert_exact(outputs(model), after)
    assert outputs(copy.deepcopy(model).half().float()).dtype == torch.float32
    with pytest.raises(RuntimeError, match="ids; got 97; need 0 to 96"):
        model(input_ids=torch.tensor([[97]]))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    filbert.revert(model)
    for name in before:
        assert_exact(model.get_submodule(name).weight, state[f"{name}.weight"])


def test_a_table_that_is_also_a_head_stays():
    model = build("bert", "MaskedLM", **SIZE)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    filbert.quantize(model, 8)
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding
    assert type(model.bert.embeddings.position_embeddings) is EmbeddingGrouped
    with pytest.raises(ValueError, match="embed_bits: got 6, need 8, 4 or None"):
        filbert.quantize(build("bert", **SIZE), 8, embed_bits=6)


def test_new_weights_must_be_quantized_again():
    model = build("bert", **SIZE)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    filbert.quantize(model, 4)
    model.load_state_dict(model.state_dict())  # its own are fine
    outputs(model)
    model.load_state_dict(before)
    with pytest.raises(RuntimeError, match=r"not what was quantized; try filbert.quantize again"):
        outputs(model)


def test_an_encoder_is_saved_and_loaded(tmp_path):
    model = build("bert", **SIZE)
    filbert.quantize(model, {"re:attention": 3, "re:.*": 6}, group=32)
    encoder = model.encoder
    encoder.save(tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "encoder.safetensors")
    assert isinstance(loaded, PackedEncoder)
    batch = PackedBatch.from_lengths([5, 1, 9])
    rows = normal(15, 64)
    with torch.inference_mode():
        assert_exact(loaded.forward_packed(rows, batch), encoder.forward_packed(rows, batch))


def test_a_row_has_the_same_bits_in_any_batch():
    model = build("bert", **SIZE)
    filbert.quantize(model, 4)
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[3, 2:] = 0
    with torch.inference_mode():
        together = model(input_ids=ids, attention_mask=mask)[0]
        for i, length in enumerate((12, 7, 12, 2)):
            one = model(input_ids=ids[i : i + 1, :length])[0]
            assert_exact(one[0], together[i, :length])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits of encoder.layer.0.attention.self.query: got 5, need one of 2, 3, 4"),
        ({"bits": {"nothing": 4}}, "which names no weight of the model's encoders"),
        ({"bits": {"re:query": 4, "re:.*": 3}}, "got 4 for .*query, 3 for .*need one number"),
        ({"bits": {"re:intermediate": 4}}, "need numbers for all or none"),
        ({"group": 48}, "group: got 48 for .* of 64 inputs, need a divisor"),
        ({"method": "gptq"}, "method: got 'gptq' without calibration"),
        ({"method": "awq"}, "method: got 'awq', need one of"),
        ({"calibration": []}, "calibration: got no sample"),
    ],
)
def test_refuses_in_words(settings, message):
    model = build("bert", **SIZE)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        filbert.quantize(model, **settings)
    for name, t in model.state_dict().items():
        assert_exact(t, before[name])


def test_a_plan_alone_has_no_codes():
    model = build("bert", **SIZE)
    with pytest.raises(filbert.ConvertError, match="grouped attention: no quantized query, key"):
        filbert.convert(model, EncoderPlan(default=LayerPlan.all("grouped")))
    with pytest.raises(ValueError, match="quantization_report: this model was not quantized here"):
        filbert.quantization_report(model)


def test_what_cannot_be_converted_is_refused_before_anything_is_changed():
    model = build("bert", **SIZE)
    model.config.is_decoder = True
    before = model.encoder.layer[0].output.dense.weight.detach().clone()
    with pytest.raises(filbert.ConvertError, match="is_decoder=True"):
        filbert.quantize(model, 4)
    assert_exact(model.encoder.layer[0].output.dense.weight, before)


def test_moments_add_up():
    x = normal(30, 8)
    whole, parts = Moments.of(x), Moments.of(x[:11]) + Moments.of(x[11:])
    assert whole.count == parts.count
    torch.testing.assert_close(parts.products, whole.products, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(parts.mean, x.double().mean(0), rtol=1e-6, atol=1e-6)
