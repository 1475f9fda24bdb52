"""The binarized model: attention by hand, published names, weights kept, padding without effect."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from binarized import batch, dense_bert, expected_weight, prepared, values
from filbert.compress import binarize as bz
from filbert.compress.binarize import BinarizedBert, BinarizedLinear
from filbert.compress.binarize.equality import compare_with_student
from filbert.compress.binarize.products import product
from filbert.compress.binarize.quantizers import Quantized

pytestmark = pytest.mark.usefixtures("one_thread")


def test_embedding_binarizes_rows_and_centres_bit_by_the_table() -> None:
    for scheme in bz.SCHEMES:
        table = bz.BinarizedEmbedding(11, 6, scheme=scheme).double()
        with torch.no_grad():
            # The mean of the rows that are looked up is far from the table's.
            table.weight += 0.3 * torch.arange(11)[:, None]
        w = table.weight.detach().numpy()
        got = table(torch.tensor([[9, 8], [10, 9]])).detach().numpy()
        np.testing.assert_allclose(got, expected_weight(w, scheme, "row")[[[9, 8], [10, 9]]])


def test_linear_is_a_dot_of_signs() -> None:
    linear = BinarizedLinear(24, 5, scheme="bibert")
    x = values(2, 7, 24)
    x[0, 0, :3] = 0
    w = linear.weight.detach().double().numpy()
    bits = np.sign(w - w.mean(axis=1, keepdims=True))
    expected = (np.sign(x.double().numpy()) @ bits.T) * np.abs(w).mean(axis=1)
    np.testing.assert_allclose(
        linear(x).detach(), expected + linear.bias.detach().double().numpy(), rtol=1e-5, atol=1e-6
    )


def test_options_must_fit_the_scheme() -> None:
    with pytest.raises(ValueError, match="bits of an activation with 'bibert': got 4"):
        BinarizedLinear(4, 4, options=bz.QuantizerOptions("bibert", bits=4))
    with pytest.raises(ValueError, match="options: got 'bit' for a 'bibert' module"):
        BinarizedLinear(4, 4, options=bz.QuantizerOptions("bit"))
    with pytest.raises(ValueError, match="scheme: got 'xnor', need one of"):
        BinarizedLinear(4, 4, scheme="xnor")
    with pytest.raises(ValueError, match="hidden_size: got 10 for 3 heads"):
        bz.BinarizedSelfAttention(10, 3)


@pytest.mark.parametrize("score_ties", ["below", "above"])
def test_bi_attention_against_its_formula(score_ties: str) -> None:
    """Counts selected keys by hand; 8 values a head make more than a quarter of the scores ties."""
    options = bz.QuantizerOptions("bibert", "below", score_ties)
    attention = bz.BinarizedSelfAttention(16, 2, options=options)
    x, keep = values(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    keep[1, 5:] = False
    context, raw = attention(x, keep)
    q, k, v = (np.where(t.detach().numpy() > 0, 1, -1) for t in raw)
    expected = np.zeros((2, 9, 16))
    tied = 0
    for b in range(2):
        for h in range(2):
            for i in range(9):
                for j in range(9):
                    score = int(q[b, h, i] @ k[b, h, j])
                    tied += score == 0
                    if keep[b, j] and (score > 0 or (score_ties == "above" and score == 0)):
                        expected[b, i, 8 * h : 8 * h + 8] += v[b, h, j]
    assert tied > 50
    np.testing.assert_array_equal(context.detach(), expected)


def test_bit_attention_against_its_formula() -> None:
    attention = bz.BinarizedSelfAttention(16, 2, scheme="bit").train()
    x, keep = values(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    keep[1, 5:] = False
    attention(x, keep)
    attention.eval()
    context, raw = attention(x, keep)
    scale = {
        name: getattr(attention, f"{name}_quantizer").scale.item()
        for name in ("query", "key", "value", "weight")
    }
    q, k, v = (
        scale[name] * np.sign(t.detach().double().numpy())
        for name, t in zip(("query", "key", "value"), raw, strict=True)
    )
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(8)
    scores[1, :, :, 5:] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    a = scale["weight"]
    real = np.concatenate([p[0].ravel(), p[1, :, :5, :5].ravel()])
    assert a == pytest.approx(4 * real.mean(), rel=1e-5)  # padding is not calibrated on
    assert np.abs(p / a - 0.5).min() > 1e-6  # no weight is near the threshold
    chosen = a * np.clip(np.rint(p / a), 0, 1)
    assert 0 < (chosen > 0).mean() < 0.9
    expected = (chosen @ v).transpose(0, 2, 1, 3).reshape(2, 9, 16)
    np.testing.assert_allclose(context.detach(), expected, rtol=1e-5, atol=1e-6)


def test_bi_attention_has_a_gradient_everywhere() -> None:
    attention = bz.BinarizedSelfAttention(16, 2)
    attention(values(2, 9, 16))[0].square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


PROJECTIONS = [
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense",
]  # fmt: skip


def published_keys(scheme: str, layers: int, labels: int) -> set[str]:
    """The entries of a published checkpoint that its own forward pass reads."""
    embeddings = ["word_embeddings.weight", "position_embeddings.weight",
                  "token_type_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"]  # fmt: skip
    keys = {f"bert.embeddings.{name}" for name in embeddings}
    linears = {"bert.pooler.dense"}
    for i in range(layers):
        layer = f"bert.encoder.layer.{i}"
        linears |= {f"{layer}.{name}" for name in PROJECTIONS}
        for norm in ("attention.output", "output"):
            keys |= {f"{layer}.{norm}.LayerNorm.weight", f"{layer}.{norm}.LayerNorm.bias"}
        if scheme != "bibert":
            keys |= {f"{layer}.attention.self.clip_{n}" for n in ("query", "key", "value", "attn")}
    parts = ["weight", "bias"]
    parts += [] if scheme == "bibert" else ["input_clip_val"]
    parts += ["move.bias"] if scheme == "bit" else []
    keys |= {f"{linear}.{part}" for linear in linears for part in parts}
    return keys | ({"classifier.weight", "classifier.bias"} if labels else set())


@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_state_dict_has_the_published_names(scheme: str, labels: int) -> None:
    dense = dense_bert()
    student = BinarizedBert.from_dense(dense, scheme)
    if labels:
        config = bz.BinarizedBertConfig.from_dict(
            {**student.config.to_dict(), "num_labels": labels}
        )
        student = BinarizedBert(config)
    assert set(student.state_dict()) == published_keys(scheme, 2, labels)


def test_a_published_checkpoint_loads_strictly() -> None:
    """With all that the published code saves beside it and never reads."""
    student = BinarizedBert.from_dense(dense_bert(), "bit")
    student.calibrate(*batch())
    state = {name: value.clone() for name, value in student.state_dict().items()}
    layer = "bert.encoder.layer.1"
    state[f"{layer}.attention.self.clip_attn"] = torch.tensor([0.125])  # [1] instead of []
    state[f"{layer}.output.dense.move.bias"] = values(128)
    for name in ("move_q", "move_k", "move_v"):
        state[f"{layer}.attention.self.{name}.bias"] = values(64)
    other = BinarizedBert(student.config)
    assert not other.calibrated
    other.load_state_dict(state)
    assert other.calibrated
    attention = other.bert["encoder"].layer[1].attention["self"]
    assert attention.weight_quantizer.scale.item() == 0.125
    assert torch.equal(other.bert["encoder"].layer[1].output.dense.quantizer.move, values(128))
    assert set(other.state_dict()) == set(student.state_dict())

    bibert = BinarizedBert.from_dense(dense_bert(), "bibert")
    state = dict(bibert.state_dict())
    for name in PROJECTIONS:
        for unread in ("scale", "weight_clip_val", "act_clip_val"):
            state[f"{layer}.{name}.{unread}"] = torch.tensor([-2.5, 2.5])
    state[f"{layer}.attention.output.gate"] = torch.tensor(1.0)
    state[f"{layer}.attention.self.clip_attn"] = torch.tensor([-2.5, 2.5])
    state["bert.embeddings.word_embeddings.weight_clip_val"] = torch.tensor([-2.5, 2.5])
    bibert.load_state_dict(state)
    with pytest.raises(RuntimeError, match="unknown_entry"):
        bibert.load_state_dict({**state, f"{layer}.unknown_entry": torch.zeros(1)})


@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_from_dense_keeps_the_weights(scheme: str) -> None:
    dense = dense_bert(num_hidden_layers=4)
    given = dense.state_dict()
    student = BinarizedBert.from_dense(dense, scheme, layers=(1, 3))
    again = BinarizedBert.from_dense(dense.config, scheme, state_dict=given, layers=(1, 3))
    kept = {"0": "1", "1": "3"}
    compared = 0
    for name, value in student.state_dict().items():
        words = name.removeprefix("bert.").split(".")
        if words[0] == "encoder":
            words[2] = kept[words[2]]
        source = given.get(".".join(words))
        if source is None:  # what the scheme adds
            assert "clip" in name or "move" in name
            continue
        compared += 1
        assert torch.equal(value, source), name
        assert torch.equal(value, again.state_dict()[name])
    assert compared == 5 + 2 * 16 + 2
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_act == ("relu" if scheme == "bit" else "gelu")
    assert student.config.layer_norm_eps == dense.config.layer_norm_eps


def test_from_dense_takes_a_classifier_and_a_model_without_pooler() -> None:
    from transformers import BertForSequenceClassification, BertModel

    config = dense_bert().config
    config.num_labels = 3
    dense = BertForSequenceClassification(config)
    student = BinarizedBert.from_dense(dense).eval()
    assert torch.equal(student.classifier.weight, dense.classifier.weight)
    assert student(*batch()).logits.shape == (6, 3)
    bare = BinarizedBert.from_dense(BertModel(config, add_pooling_layer=False)).eval()
    out = bare(*batch())
    assert out.pooler_output is None
    assert out.logits is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BertForQuestionAnswering", "qa_outputs.weight"),
        ("BertForMaskedLM", "cls.predictions"),
        ("BertForPreTraining", "cls."),
        ("BertForTokenClassification", "its head"),
        ("BertForMultipleChoice", "its head"),
    ],
)
def test_from_dense_refuses_other_heads(name: str, words: str) -> None:
    import transformers

    dense = getattr(transformers, name)(dense_bert().config)
    with pytest.raises(ValueError, match=f"dense: got {name} with {words}.*from_dense"):
        BinarizedBert.from_dense(dense)
    assert BinarizedBert.from_dense(dense.bert).classifier is None


def test_from_dense_refuses() -> None:
    from transformers import DistilBertConfig

    dense = dense_bert()
    state = dense.state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    wanted = r"1 weights do not fit, first bert.encoder.layer.1.output.dense.weight \(got nothing"
    with pytest.raises(ValueError, match=wanted):
        BinarizedBert.from_dense(dense.config, state_dict=state)
    with pytest.raises(ValueError, match="got model_type 'distilbert'"):
        BinarizedBert.from_dense(DistilBertConfig(), state_dict=state)
    with pytest.raises(ValueError, match=r"layers: got \[2\], need indices from 0 to 1"):
        BinarizedBert.from_dense(dense, layers=[2])


@pytest.mark.parametrize("mode", ["static", "row"])
@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_padding_does_not_matter(scheme: str, mode: str) -> None:
    student = prepared(scheme, mode=mode)
    ids, mask = batch()
    real = mask.bool()
    out = student(ids, mask)
    other = ids.masked_fill(~real, 50)
    longer = torch.full((6, 20), 31)
    longer[:, :12] = other
    wide = torch.zeros(6, 20, dtype=mask.dtype)
    wide[:, :12] = mask
    again = student(longer, wide)
    torch.testing.assert_close(again.last_hidden_state[:, :12], out.last_hidden_state)
    torch.testing.assert_close(again.pooler_output, out.pooler_output)
    assert out.last_hidden_state[~real].abs().max() == 0
    alone = student(ids[1:2, :7])  # without a mask
    torch.testing.assert_close(alone.last_hidden_state[0], out.last_hidden_state[1, :7])
    # and the calibrated scales do not depend on it either
    one = BinarizedBert.from_dense(dense_bert(), scheme, mode=mode)
    two = BinarizedBert.from_dense(dense_bert(), scheme, mode=mode)
    one.calibrate(ids, mask)
    two.calibrate(longer, wide)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name])


@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_a_sequence_of_nothing_but_padding_is_finite(scheme: str) -> None:
    student = prepared(scheme).train()
    ids, mask = batch()
    mask[2] = 0
    out = student(ids, mask)
    out.last_hidden_state.square().sum().backward()
    assert out.last_hidden_state.isfinite().all()
    for name, parameter in student.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_ties_change_the_model() -> None:
    """Contexts of Bi-Attention are whole numbers and often 0, so the choice is no detail."""
    ids, mask = batch()
    outs = [prepared("bibert", ties=ties)(ids, mask).last_hidden_state for ties in bz.TIES]
    assert (outs[0] - outs[1]).abs().max() > 0.1
    assert (outs[0] - outs[2]).abs().max() > 0.1


def test_forward_refuses() -> None:
    student = prepared("bibert")
    ids, mask = batch()
    with pytest.raises(ValueError, match=r"input_ids: got shape \(6, 40\), need \[B, S\] with S"):
        student(torch.zeros(6, 40, dtype=torch.long))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(6, 1, 1, 12\)"):
        student(ids, mask[:, None, None])
    with pytest.raises(RuntimeError, match="ElasticBinarizer: got a scale that no batch has set"):
        BinarizedBert.from_dense(dense_bert(), "bit").eval()(ids, mask)


def test_save_and_load(tmp_path: Path) -> None:
    for scheme in bz.SCHEMES:
        student = prepared(scheme, ties="below")
        student.save(tmp_path / scheme)
        loaded = BinarizedBert.load(tmp_path / scheme)
        assert loaded.config == student.config
        a, b = student(*batch()), loaded(*batch())
        assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    with pytest.raises(ValueError, match="not a BinarizedBertConfig: got 'bert'"):
        bz.BinarizedBertConfig.from_dict({"model_type": "bert", "version": 1})


@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_pickle_and_deepcopy(scheme: str) -> None:
    student = prepared(scheme)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    expected = student(*batch()).last_hidden_state
    for other in (torch.load(file, weights_only=False), copy.deepcopy(student)):
        assert torch.equal(other(*batch()).last_hidden_state, expected)
        assert list(other.state_dict()) == list(student.state_dict())
        changed = {name: value + 1 for name, value in student.state_dict().items()}
        other.load_state_dict(changed)  # into the copy, by published names
        for name, value in other.state_dict().items():
            assert torch.equal(value, changed[name])
    assert torch.equal(student(*batch()).last_hidden_state, expected)


# Integers are summed first


def zero_biases(scheme: str, ties: str, seed: int) -> BinarizedBert:
    """As Hugging Face initialises: all biases 0, so that every even sum can tie."""
    dense = dense_bert(seed)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    student = BinarizedBert.from_dense(dense, scheme, ties=ties)
    student.calibrate(*batch())
    return student.eval()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ties", ["below", "above"])
@pytest.mark.parametrize("scheme", ["bibert", "bit"])
def test_packed_is_the_student_where_everything_ties(scheme: str, ties: str, seed: int) -> None:
    """With seed 1, "bibert" and "above" also where a GELU underflows to -0.0."""
    student = zero_biases(scheme, ties, seed)
    packed = bz.binarize(student, check=False)
    ids, mask = batch(seed + 1)
    ids[1, 7:] = 0
    types = torch.arange(12).expand_as(ids) % 2
    with torch.no_grad():
        ours, theirs = packed(ids, mask, types), student(ids, mask, types)
    torch.testing.assert_close(
        ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, rtol=1e-5, atol=1e-5)
    student.train()
    found = compare_with_student(student, packed, ids, mask, types)
    assert (found.compared, found.mismatches) == (int(mask.sum()) + 6, 0)
    assert found.difference < 1e-5
    assert all(module.training for module in student.modules())
    with torch.no_grad():
        student.bert["encoder"].layer[1].output.dense.bias[0] += 0.5
        student.bert["pooler"].dense.bias[3] += 0.5
    found = compare_with_student(student, packed, ids, mask, types)
    assert found.mismatches == found.compared
    assert found.difference > 0.01


def test_zero_sums_are_zero_in_the_student() -> None:
    """Scaled first, such a sum is some 1e-8 above or below."""
    for scheme in ("bibert", "bit"):
        linear = BinarizedLinear(64, 400, False, scheme=scheme, options=bz.QuantizerOptions(
            scheme, ties="below")).train()  # fmt: skip
        x = values(50, 64)
        y = linear(x).detach()
        dots = bz.sign(x, "below").double() @ bz.sign(linear.binary_weight(), "below").double().T
        assert 0.05 < (dots == 0).double().mean() < 0.2
        assert torch.equal(y == 0, dots == 0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_product_has_the_gradients_of_its_values(batched: bool, wide: bool) -> None:
    a = values(3, 4, 5, dtype=torch.float64).requires_grad_()
    b = values(*((3, 5, 6) if batched else (5, 6)), seed=1, dtype=torch.float64).requires_grad_()
    codes = a.detach().round(), b.detach().sign()
    worth = torch.full((3, 4, 1), 0.5).double() if wide else torch.tensor(0.5).double()
    out = product(
        Quantized(a, codes[0], worth, wide), Quantized(b, codes[1], torch.arange(6.0).double())
    )
    torch.testing.assert_close(out, codes[0] @ codes[1] * torch.arange(6.0).double() * 0.5)
    weights = values(3, 4, 6, seed=2, dtype=torch.float64)
    got = torch.autograd.grad((out * weights).sum(), (a, b))
    expected = torch.autograd.grad((a @ b * weights).sum(), (a, b))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_linear_gradients_are_of_the_scaled_values(scheme: str) -> None:
    """Of the input, the latent weight, the bias, and what the quantizer learns."""
    linear = BinarizedLinear(12, 5, scheme=scheme).double().train()
    x = values(2, 3, 12, dtype=torch.float64).requires_grad_()
    linear(x)  # calibrates
    leaves = [x, *linear.parameters()]
    weights = values(2, 3, 5, seed=2, dtype=torch.float64)
    got = torch.autograd.grad((linear(x) * weights).sum(), leaves)
    smooth = torch.nn.functional.linear(linear.quantizer(x), linear.binary_weight(), linear.bias)
    torch.testing.assert_close(linear(x), smooth)
    for one, other in zip(got, torch.autograd.grad((smooth * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scheme", bz.SCHEMES)
def test_attention_gradients_are_of_the_scaled_values(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = bz.BinarizedSelfAttention(16, 2, scheme=scheme).double().train()
    x, keep = values(2, 9, 16, dtype=torch.float64), torch.ones(2, 9, dtype=torch.bool)
    keep[1, 5:] = False
    attention(x, keep)
    leaves = [x.requires_grad_(), *attention.parameters()]
    weights = values(2, 9, 16, seed=2, dtype=torch.float64)
    got = torch.autograd.grad((attention(x, keep)[0] * weights).sum(), leaves)
    monkeypatch.setattr(f"{bz.__name__}.modules.product", lambda a, b: a.value @ b.value)
    expected = torch.autograd.grad((attention(x, keep)[0] * weights).sum(), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
