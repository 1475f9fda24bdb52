"""``filbert.binarize``: checkpoints of every published layout against the papers' formulas, and
whether the report tells the truth."""

from __future__ import annotations

import pytest
import torch

import filbert
from binarize_cases import own, refused
from binary_reference import CONFIG, FEW_BITS, SIZES, Reference, above, batch, below, checkpoint
from filbert.compress.binarize.checkpoints import read_checkpoint, recognise
from filbert.compress.binarize.conversion import _example
from filbert.compress.binarize.equality import compare
from models import build
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")


def run(model, ids, mask, types):
    with torch.inference_mode():
        return model(ids, mask, types)


def assert_same_model(model, reference, at=2e-5):
    """Both on one batch, where tokens are; one wrong bit would show by far more than ``at``."""
    ids, mask, types = batch(3)
    ours = run(model, ids, mask, types)
    rows, pooled, logits = reference(ids, mask, types)
    torch.testing.assert_close(ours.last_hidden_state[mask].double(), rows[mask], rtol=at, atol=at)
    torch.testing.assert_close(ours.pooler_output.double(), pooled, rtol=at, atol=at)
    torch.testing.assert_close(ours.logits.double(), logits, rtol=at, atol=at)


@pytest.mark.parametrize("exact", [None, True])
@pytest.mark.parametrize("scheme", ["bibert", "bit"])
def test_the_default_is_the_published_model(scheme, exact):
    """Signs of 0 and all, without asking; asking only refuses what could not be equal."""
    state = checkpoint(scheme)
    model = filbert.binarize(state, config=CONFIG, exact=exact)
    assert model.about["scheme"] == model.report.scheme == scheme
    assert model.about["ties"] == model.report.ties == "exact"
    assert model.report.mismatches == 0
    assert_same_model(model, Reference(state, scheme))
    if scheme == "bibert":
        assert model.report.ties_met > 100  # zeros there were, and they are zeros here


@pytest.mark.parametrize(("ties", "sign"), [("below", below), ("above", above)])
@pytest.mark.parametrize("scheme", ["bibert", "bit"])
def test_two_valued_forms_are_asked_for_by_name(scheme, ties, sign):
    """They are the paper but for ties, which are counted."""
    state = checkpoint(scheme)
    model = filbert.binarize(state, config=CONFIG, ties=ties)
    if ties == "below":
        other = filbert.binarize(state, config=CONFIG, exact=False, check=False)
        assert other.to_config() == model.to_config()
    report = model.report
    assert report.mismatches == report.ties_met
    assert (report.ties_met > 100) == (scheme == "bibert")
    assert_same_model(model, Reference(state, scheme, sign))
    if scheme == "bibert":  # and a model of torch.sign is another one
        with pytest.raises(AssertionError):
            assert_same_model(model, Reference(state, scheme))


def test_two_values_of_a_student_are_those_it_was_trained_with():
    student = own("bibert", ties="above")
    ids, mask, types = batch(3)
    student.calibrate(ids, mask, types)
    for asked, made in (({"exact": False}, "above"), ({"ties": "below"}, "below")):
        model = filbert.binarize(student, check=False, **asked)
        assert model.about["ties"] == model.report.ties == made


def test_a_few_bits_know_no_largest_head(monkeypatch):
    """Their softmax is rounded, so no attention kernel runs, nor its limit holds."""
    for name, size in {"hidden": 288, "heads": 1, "layers": 1, "inner": 32}.items():
        monkeypatch.setitem(SIZES, name, size)
    state = checkpoint("binarybert")
    config = {**FEW_BITS, "num_attention_heads": 1}
    assert_same_model(
        filbert.binarize(state, config=config), Reference(state, "binarybert"), at=5e-2
    )
    assert "need a whole number each" in refused(
        state, config={**FEW_BITS, "num_attention_heads": 5}
    )


def test_score_ties():
    state = checkpoint("bibert")
    model = filbert.binarize(state, config=CONFIG, ties="below", score_ties="above")
    assert_same_model(model, Reference(state, "bibert", below, choose_zeros=True))
    with pytest.raises(AssertionError):
        assert_same_model(model, Reference(state, "bibert", below))


#: of attention probabilities, a step whose largest code is below 1, and one that clips nothing
@pytest.mark.parametrize("step", [0.0041, 0.0193])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("split", [False, True])
def test_binarybert(split, symmetric, step):
    """Eight-bit activations, and a softmax that is rounded and clipped; halves of a split layer are
    added. A code may differ where a number lies halfway between two."""
    config = {**FEW_BITS, "sym_quant_ffn_attn": symmetric, "weight_layerwise": split}
    config["hidden_act"] = "gelu" if symmetric else "relu"

    def reference(seed=0):
        state = checkpoint("binarybert", split=split, seed=seed)
        for name in state:
            if name.endswith("clip_attn"):
                state[name] = torch.tensor(step)
        more = {"symmetric": symmetric, "layerwise": split}
        return state, Reference(state, "binarybert", **more)

    state, right = reference()
    model = filbert.binarize(state, config=config)
    assert model.report.mismatches <= 5
    assert_same_model(model, right, at=5e-2)
    with pytest.raises(AssertionError):
        assert_same_model(model, reference(seed=1)[1], at=5e-2)
    for layer in model.encoder.layers:
        layer.attention.prob_levels = None  # as if the softmax were not rounded
    ids, mask, types = batch(3)
    rows = run(model, ids, mask, types).last_hidden_state[mask]
    assert (rows - right(ids, mask, types)[0][mask]).abs().max() > (5e-2 if step < 0.01 else 1e-3)


@pytest.mark.parametrize("prefix", ["", "bert.", "module.bert."])
@pytest.mark.parametrize("old", [False, True])
def test_names_of_every_age(prefix, old):
    plain = filbert.binarize(checkpoint("bibert"), config=CONFIG, check=False)
    state = checkpoint("bibert", prefix=prefix, old=old)
    other = filbert.binarize(state, config=CONFIG, check=False)
    for name, t in plain.state_dict().items():
        assert_exact(other.state_dict()[name], t)


@pytest.mark.parametrize(
    ("scheme", "pattern"),
    [("bibert", "clip"), ("bibert", ".scale"), ("bibert", "gate"), ("bit", "move_")],
)
def test_what_no_forward_pass_reads_changes_nothing(scheme, pattern):
    state = checkpoint(scheme)
    changed = {k: v + 0.5 if pattern in k else v for k, v in state.items()}
    assert sum(pattern in k for k in state) >= 4
    plain, other = (filbert.binarize(s, config=CONFIG, check=False) for s in (state, changed))
    ids, mask, types = batch()
    for a, b in zip(run(plain, ids, mask, types), run(other, ids, mask, types), strict=True):
        assert_exact(a, b)
    assert not any("not part of the model" in note for note in plain.report.notes)
    read = {k: v + 0.5 if "query.bias" in k else v for k, v in state.items()}
    third = run(filbert.binarize(read, config=CONFIG, check=False), ids, mask, types)
    assert not torch.equal(third[0], run(plain, ids, mask, types)[0])


@pytest.mark.parametrize("scheme", ["bibert", "bit", "binarybert"])
def test_fingerprints(scheme):
    assert recognise(checkpoint(scheme)) == scheme
    assert recognise(build("bert").state_dict()) is None


@pytest.mark.parametrize("ties", ["below", "above", "zero"])
@pytest.mark.parametrize("scheme", ["bibert", "bit"])
def test_our_own_student(scheme, ties):
    """Whatever ties it was trained with: nothing has to be asked for."""
    student = own(scheme, ties=ties)
    ids, mask, types = batch(3)
    student.calibrate(ids, mask, types)
    model = filbert.binarize(student)
    end = model.report.parts[-1]
    assert (end.part, end.mismatches) == ("trained model", 0)
    assert end.compared > 10
    if (scheme, ties) == ("bibert", "above"):  # GELU's -0.0, which the student keeps negative
        wrong = {part.part for part in model.report.parts if part.mismatches}
        assert wrong <= {"layer 0: inner", "layer 1: inner"}
        assert model.report.mismatches < 10
    else:
        assert model.report.mismatches == 0
    with torch.no_grad():
        theirs = student(ids, mask, types)
    ours = run(model, ids, mask, types)
    torch.testing.assert_close(
        ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "row", "hidden_size": 52}, {"bits": 4, "hidden_act": "relu"}]
)
def test_our_own_few_bit_student(options):
    student = own("binarybert", **options)
    ids, mask, types = batch(3)
    student.calibrate(ids, mask, types)
    model = filbert.binarize(student)
    # Of some 20,000 codes, those of numbers halfway between two may be the other one.
    assert model.report.mismatches <= 10
    parts = {part.part: part for part in model.report.parts}
    assert parts["layer 0: query, key, value"].difference < 1e-4
    assert parts["layer 1: feed-forward"].difference < 1e-4
    assert parts["layer 0: attention"].difference < 1e-2  # a code of one probability, at most
    assert model.about["activation_bits"] == options.get("bits", 8)
    assert parts["trained model"].difference < 5e-2
    half = filbert.binarize(student.bfloat16()).report
    assert half.parts[-1].part != "trained model"
    assert "not compared with the trained model's" in str(half)


def test_exact_has_its_limits():
    state = checkpoint("bibert")
    weight = state["bert.encoder.layer.0.output.dense.weight"]
    weight[3] = torch.arange(80.0) % 2
    weight[3, :2] = 0.5  # two weights at the row's mean, exactly
    assert "2 weights equal their mean" in refused(state, config=CONFIG, exact=True)
    model = filbert.binarize(state, config=CONFIG)
    assert model.report.weight_ties == 2
    assert "2 weights at their mean" in str(model.report)
    assert "exact" in refused(checkpoint("bibert"), config=CONFIG, exact=True, ties="above")
    with pytest.raises(ValueError, match="ties: got 'exact'"):
        filbert.binarize(checkpoint("bibert"), ties="exact")


def test_rows_without_a_scale():
    state = checkpoint("bibert")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    state[name][:3] = 0.0  # alpha 0
    state[name][3] = 1.5  # constant: every weight at the mean
    model = filbert.binarize(state, config=CONFIG, exact=True)
    assert model.report.weight_ties == 0
    assert model.report.zero_rows == 5  # and the padding token's
    assert model.report.mismatches == 0
    assert_same_model(model, Reference(state, "bibert"))


def test_the_report_finds_a_wrong_bit_and_a_wrong_scale():
    latent = read_checkpoint(checkpoint("bibert"), config=CONFIG)
    model = filbert.binarize(checkpoint("bibert"), config=CONFIG)
    assert not any(part.mismatches for part in model.report.parts)
    layer = model.encoder.layers[1]
    layer.feed_forward.up.weight[0, 0, 0] ^= 1 << 7
    layer.feed_forward.up.derive()
    layer.out.alpha *= 1.01
    with torch.inference_mode():
        parts = {part.part: part for part in compare(latent, model, *_example(latent))}
    assert parts["layer 1: inner"].mismatches > 0
    assert parts["layer 1: output"].difference > 1e-3
    assert parts["layer 0: inner"].mismatches == 0
    assert parts["layer 0: output"].difference < 1e-5
    assert parts["whole model"].difference > 1e-2


def test_the_report_prints_what_it_knows(tmp_path):
    model = filbert.binarize(checkpoint("bibert"), config=CONFIG)
    text = str(model.report)
    for words in ("layer 1: attention", "mismatches", "ratio", "rows of weights with scale 0",
                  f"{model.report.size.total:,}"):  # fmt: skip
        assert words in text
    quick = filbert.binarize(checkpoint("bibert"), config=CONFIG, check=False)
    assert "not compared" in str(quick.report)
    odd = {**checkpoint("bibert"), "bert.extra": torch.ones(1)}
    assert "1 entries are not part" in str(filbert.binarize(odd, config=CONFIG, check=False).report)


@pytest.mark.parametrize("scheme", ["bibert", "bit", "binarybert"])
def test_size_is_the_files(scheme, tmp_path):
    state = checkpoint(scheme)
    model = filbert.binarize(
        state, config=FEW_BITS if scheme == "binarybert" else CONFIG, check=False
    )
    model.save(tmp_path / "model.safetensors")
    size = model.report.size
    assert size.total == (tmp_path / "model.safetensors").stat().st_size
    names = ("weight", "bias")
    original = [v for k, v in state.items() if k.endswith(names) and "move" not in k]
    assert size.original == 4 * sum(v.numel() for v in original)
    bits = [v for k, v in state.items() if k.endswith("weight") and v.ndim == 2]
    padded = sum(-(-v.shape[1] // 32) * 4 * v.shape[0] for v in bits)
    floats = sum(
        -(-v.shape[1] // 32) * 4 * v.shape[0]
        for k, v in state.items()
        if any(n in k for n in ("position_emb", "token_type", "classifier.weight"))
    )
    assert size.parts["bits of weights"] == padded - floats
    assert size.parts["LayerNorms"] == 4 * 2 * 64 * 5
    assert size.parts["position and type embeddings"] == 4 * 64 * (24 + 2)


def test_bert_base_is_27_times_smaller(tmp_path):
    """With everything that is stored: positions, scales, biases, LayerNorms, names."""
    generator = torch.Generator().manual_seed(0)
    n, inner = 768, 3072
    state = {"embeddings.word_embeddings.weight": torch.randn(30522, n, generator=generator)}
    state["embeddings.position_embeddings.weight"] = torch.randn(512, n, generator=generator)
    state["embeddings.token_type_embeddings.weight"] = torch.randn(2, n, generator=generator)
    shapes = {"attention.self.query": (n, n), "attention.self.key": (n, n),
              "attention.self.value": (n, n), "attention.output.dense": (n, n),
              "intermediate.dense": (inner, n), "output.dense": (n, inner)}  # fmt: skip
    names = [(f"encoder.layer.{i}.{name}", s) for i in range(12) for name, s in shapes.items()]
    for name, (rows, columns) in [*names, ("pooler.dense", (n, n))]:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator)
        state[f"{name}.bias"] = torch.randn(rows, generator=generator)
        state[f"{name}.scale"] = torch.zeros(())
    norms = [f"encoder.layer.{i}.{p}" for i in range(12) for p in ("attention.output", "output")]
    for name in ["embeddings", *norms]:
        state[f"{name}.LayerNorm.weight"] = torch.ones(n)
        state[f"{name}.LayerNorm.bias"] = torch.zeros(n)
    model = filbert.binarize(state, config={"num_attention_heads": 12}, check=False)
    model.save(tmp_path / "base.safetensors")
    size = (tmp_path / "base.safetensors").stat().st_size
    assert model.report.size.original == 4 * 109_482_240
    assert model.report.size.total == size
    assert 27.0 <= model.report.size.original / size < 28.0
    assert (
        filbert.load_binary(tmp_path / "base.safetensors").encoder.layers[11].feed_forward.up.nbytes
        > 0
    )
