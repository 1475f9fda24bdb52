"""What users hand over in the place of a model: taken where it holds one, or told what to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import filbert
from filbert.conversion.swap import SwappedEncoder
from models import MASKS, build, swapped, tokens
from tiny_model import save_tiny_bert, sentence
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [sentence(n) for n in (3, 8, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("bert-base-uncased", r"AutoModel\.from_pretrained\('bert-base-uncased'\)"),
        (Path("a/folder"), r"AutoModel\.from_pretrained\('a/folder'\)"),
        (transformers.BertModel, r"an instance: BertModel"),
        (None, "NoneType"),
        ({"model": 3}, "dict"),
    ],
    ids=str,
)
def test_what_is_no_model(given, words):
    ids = torch.ones(1, 3, dtype=torch.long)
    for call in (
        filbert.convert,
        filbert.revert,
        filbert.report,
        filbert.capture,
        lambda model: filbert.embed(model, ids),
    ):
        with pytest.raises(TypeError, match=rf"need a model.*{words}|{words}.*need a model"):
            call(given)


def test_a_pipeline_is_converted_where_it_stands(folder):
    pipe = transformers.pipeline("feature-extraction", model=str(folder), tokenizer=str(folder))
    plain = [torch.tensor(rows) for rows in pipe(TEXTS)]
    assert filbert.convert(pipe) is pipe
    assert isinstance(pipe.model.encoder, SwappedEncoder)
    for ours, theirs in zip(pipe(TEXTS), plain, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-4)
    ids = pipe.tokenizer(TEXTS, padding=True, return_tensors="pt")
    pooled = filbert.embed(pipe, ids["input_ids"], ids["attention_mask"])
    torch.testing.assert_close(pooled[0], plain[0][0].mean(0), rtol=1e-4, atol=1e-4)
    assert any(row.now == "SwappedEncoder" for row in filbert.report(pipe))
    assert filbert.revert(pipe) is pipe
    assert not isinstance(pipe.model.encoder, SwappedEncoder)


def sentence_transformer(folder, pooling, *more):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts

    transformer = parts.Transformer(str(folder))
    pool = parts.Pooling(64, pooling)
    return SentenceTransformer(modules=[transformer, pool, *more], device="cpu").eval()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embed_of_a_sentence_transformer_does_what_it_does(folder, pooling, normalize):
    from sentence_transformers import models as parts

    model = sentence_transformer(folder, pooling, *([parts.Normalize()] if normalize else []))
    want = model.encode(TEXTS, convert_to_tensor=True).clone()
    filbert.convert(model)
    ids = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    got = filbert.embed(model, ids["input_ids"], ids["attention_mask"])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.encode(TEXTS, convert_to_tensor=True), want, rtol=1e-4, atol=1e-4
    )
    other = filbert.embed(model, ids["input_ids"], ids["attention_mask"], "mean", normalize=False)
    is_the_same = torch.allclose(other, want, rtol=1e-4, atol=1e-4)
    assert is_the_same == (pooling == "mean" and not normalize)


def test_a_sentence_transformer_that_does_more(folder):
    from sentence_transformers import models as parts

    ids = torch.ones(1, 3, dtype=torch.long)
    dense = parts.Dense(64, 8)
    for model in (sentence_transformer(folder, "mean", dense), sentence_transformer(folder, "max")):
        filbert.convert(model)
        with pytest.raises(ValueError, match=r"need a Transformer, a Pooling.*model\.encode"):
            filbert.embed(model, ids)
        assert filbert.embed(model, ids, pooling="mean", normalize=False).shape == (1, 64)


def test_ids_that_are_no_tensor():
    model = filbert.convert(build("bert"))
    for ids in ([[1, 2]], {"input_ids": torch.ones(1, 2)}, "text"):
        with pytest.raises(TypeError, match=r"input_ids: got \w+, need a tensor"):
            filbert.embed(model, ids)


@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
def test_embeddings_are_ordinary_tensors(pooling):
    """A frozen encoder under a probe that is trained; also where the encoder could be trained."""
    mask = MASKS["right"]
    model = filbert.convert(build("bert"))
    got = filbert.embed(model, tokens(mask), mask, pooling)
    rows, batch = got if pooling == "none" else (got, None)
    assert not rows.is_inference()
    assert not rows.requires_grad
    if batch is not None:
        assert not batch.indices.is_inference()
    probe = nn.Linear(48, 2)
    probe(rows).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


def test_arguments_of_the_loss_ask_nothing_of_the_encoder():
    mask = MASKS["right"]
    encoder = swapped(filbert.convert(build("bert")))
    hidden = torch.zeros(3, 9, 48)
    with torch.no_grad():
        want = encoder(hidden, mask)[0]
        got = encoder(
            hidden, mask, shift_labels=tokens(mask), ignore_index=3, num_items_in_batch=2
        )[0]
    assert_exact(got, want)
