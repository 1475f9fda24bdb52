"""The engine behind ``filbert embed``: model folders, batching, pooling."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from filbert.app.corpus import minilm_folder
from filbert.app.embedder import Embedder, ModelFolder
from filbert.app.embedding import EmbedJob, plan_batches, run_job
from filbert.app.textfile import EmbedError
from tiny_model import save_tiny_bert, sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> EmbedJob:
    """Forty texts, the fifth empty."""
    texts = [sentence(i) for i in range(40)]
    texts[4] = ""
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return EmbedJob(folder, tmp_path / "in.txt", tmp_path / "out.npy", quiet=True)


def by_hand(folder: Path, texts: list[str], pooling: str, normalize: bool) -> np.ndarray:
    """One text at a time with transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    rows = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=48)
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state[0]
        row = hidden[0] if pooling == "cls" else hidden.mean(0)
        rows.append((row / row.norm() if normalize else row).numpy())
    return np.stack(rows)


# Batches


@given(
    lengths=st.lists(st.integers(2, 600), max_size=60),
    batch_tokens=st.none() | st.integers(1, 2000),
    batch_size=st.none() | st.integers(1, 9),
)
def test_batches_hold_every_text_once_within_bounds(
    lengths: list[int], batch_tokens: int | None, batch_size: int | None
) -> None:
    if batch_tokens is None and batch_size is None:
        with pytest.raises(ValueError, match="need batch_tokens or batch_size"):
            plan_batches(lengths)
        return
    batches = plan_batches(lengths, batch_tokens=batch_tokens, batch_size=batch_size)
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    by_length = [lengths[i] for batch in batches for i in batch]
    assert by_length == sorted(lengths, reverse=True)
    for batch in batches:
        assert batch_size is None or len(batch) <= batch_size
        longest = max(lengths[i] for i in batch)
        assert batch_tokens is None or len(batch) == 1 or len(batch) * longest <= batch_tokens


# Embeddings


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("cls", True)])
def test_every_row_is_its_text_alone(
    job: EmbedJob, convert: bool, pooling: str, normalize: bool
) -> None:
    """Whatever runs beside a text, whatever the order: its row is what transformers gives it."""
    job = replace(job, pooling=pooling, normalize=normalize, convert=convert, batch_tokens=200)
    run_job(job)
    texts = job.input.read_text(encoding="utf-8").splitlines()
    expected = by_hand(job.model, texts, pooling, normalize)
    # Values of about 2, and transformers' own rows move by 2.4e-6 with their padding on AVX-512.
    atol = 5e-6 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 2e-6
    np.testing.assert_allclose(np.load(job.output), expected, rtol=0, atol=atol)


def test_minilm_follows_its_own_recipe() -> None:
    """Mean pooling, unit length, 256 tokens: what its three JSON files say."""
    folder = ModelFolder.read(minilm_folder())
    assert (folder.pooling, folder.normalize, folder.max_length) == ("mean", True, 256)
    embedder = Embedder.load(folder)
    texts = ["A cat sat on the mat.", "word " * 400, "", "Rome is the capital of Italy."]
    ids = embedder.tokenize(texts)
    assert [len(one) for one in ids] == [9, 256, 2, 9]
    rows = embedder.embed_ids(ids, plan_batches([9, 256, 2, 9], batch_size=2))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    plain = Embedder.load(folder, convert=False)
    for one, row in zip(ids, rows, strict=True):
        np.testing.assert_allclose(row, plain.embed_batch([one])[0], rtol=0, atol=2e-6)
    near, far = embedder.embed_batch(embedder.tokenize(["A cat is sitting.", "Stock prices fell."]))
    assert rows[0] @ near > 0.6 > 0.3 > rows[0] @ far


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_is_the_same_bits_in_any_file(
    job: EmbedJob, tmp_path: Path, dtype: str, pooling: str
) -> None:
    """Alone, in batches of any size, in another order, on another number of threads."""
    job = replace(job, dtype=dtype, pooling=pooling)
    texts = job.input.read_text(encoding="utf-8").splitlines()
    run_job(replace(job, batch_tokens=400))
    together = np.load(job.output)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        order = [*range(39, -1, -2), *range(0, 40, 2)]
        for name, chosen, batch_tokens in (("order", order, 90), ("alone", [7], 400)):
            file = tmp_path / f"{name}.txt"
            file.write_text("".join(f"{texts[i]}\n" for i in chosen), encoding="utf-8")
            own = replace(
                job, input=file, output=tmp_path / f"{name}.npy", batch_tokens=batch_tokens
            )
            run_job(own)
            assert np.load(own.output).tobytes() == together[chosen].tobytes()
    finally:
        torch.set_num_threads(before)


def test_bfloat16_stays_close(job: EmbedJob) -> None:
    run_job(replace(job, normalize=True))
    other = replace(job, output=job.output.with_name("half.npy"), dtype="bfloat16", normalize=True)
    run_job(other)
    full, half = np.load(job.output), np.load(other.output)
    assert half.dtype == np.float32
    assert (full * half).sum(axis=1).min() > 0.999
    assert not np.array_equal(full, half)


def test_value_that_is_not_finite_names_the_line(job: EmbedJob, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    bad = shutil.copytree(job.model, tmp_path / "bad")
    model = AutoModel.from_pretrained(str(bad))
    token = AutoTokenizer.from_pretrained(str(bad)).convert_tokens_to_ids("nan")
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[token] = float("nan")
    model.save_pretrained(bad)
    lines = job.input.read_text(encoding="utf-8").splitlines()
    lines[17] = "the nan sat"
    job.input.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(EmbedError, match=r"line 18: its embedding is not finite"):
        run_job(replace(job, model=bad))
    assert not job.output.exists()


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    Embedder.load(ModelFolder.read(folder), convert=False)
    with pytest.raises(EmbedError, match="nothing is downloaded"):
        ModelFolder.read(Path("bert-base-uncased"))


# Model folders


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["config.json"], "has no config.json"),
        (["model.safetensors"], "has no model.safetensors or"),
        (["vocab.txt"], "has no tokenizer.json or vocab.txt"),
    ],
)
def test_incomplete_folder(folder: Path, tmp_path: Path, names: list[str], words: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in names:
        (copy / name).unlink()
    with pytest.raises(EmbedError, match="need a complete folder") as error:
        ModelFolder.read(copy)
    assert words in str(error.value)


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EmbedError, match=r"lacks 1 weights .*layer\.1\.output\.dense\.weight"):
        Embedder.load(ModelFolder.read(copy))


def test_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / "vocab.txt").open("a", encoding="utf-8") as vocab:
        vocab.write("extra\n")
    with pytest.raises(EmbedError, match="need at most the"):
        Embedder.load(ModelFolder.read(copy))


def test_broken_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(EmbedError, match="does not load") as error:
        Embedder.load(ModelFolder.read(copy))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max_tokens"),
        ({"pooling_mode": ["mean", "max"]}, "mean+max"),
    ],
)
def test_pooling_is_read_from_the_folder(
    folder: Path, tmp_path: Path, config: dict[str, object], pooling: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "1_Pooling").mkdir()
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = ModelFolder.read(copy)
    assert read.pooling == pooling
    if pooling not in ("mean", "cls"):
        with pytest.raises(EmbedError, match="try --pooling mean"):
            Embedder.load(read)
        assert Embedder.load(read, pooling="cls").pooling == "cls"


def test_recipe_with_more_modules_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "2_Dense", "type": "x.models.Dense"}]
    (copy / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(EmbedError, match=r"has Dense; need only"):
        ModelFolder.read(copy)


def test_prompt_and_lower_case(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    prompts = {"prompts": {"doc": "the dog "}, "default_prompt_name": "doc"}
    (copy / "config_sentence_transformers.json").write_text(json.dumps(prompts), encoding="utf-8")
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 9}', encoding="utf-8")
    embedder = Embedder.load(ModelFolder.read(copy), convert=False)
    ids = embedder.tokenize(["cat", "cat " * 30])
    assert embedder.tokenizer.convert_ids_to_tokens(ids[0]) == [
        "[CLS]",
        *["the", "dog", "cat"],
        "[SEP]",
    ]
    assert len(ids[1]) == 9


@pytest.mark.parametrize("length", [2, 65])
def test_length_beyond_the_position_table(folder: Path, length: int) -> None:
    with pytest.raises(EmbedError, match=rf"got {length} tokens, need 3 to 64"):
        Embedder.load(ModelFolder.read(folder), max_length=length)


def test_roberta_positions_begin_after_padding(folder: Path, tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    copy = shutil.copytree(folder, tmp_path / "copy")
    RobertaModel(
        RobertaConfig(
            vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=34, pad_token_id=0,
        )
    ).save_pretrained(copy)  # fmt: skip
    embedder = Embedder.load(ModelFolder.read(copy), convert=False)
    assert embedder.max_length == 33
    assert np.isfinite(embedder.embed_batch(embedder.tokenize(["cat " * 99, "dog"]))).all()
