"""The engine behind ``filbert embed``: reading, batching, pooling, and writing that can be cut."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from filbert import rowstore, textfile
from filbert.corpus import minilm_folder
from filbert.embedder import Embedder, ModelFolder
from filbert.embedding import EmbedJob, plan_batches, run_job
from filbert.rowstore import RowStore
from filbert.textfile import EmbedError, TextFile
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


# Texts in


def scan(path: Path, data: bytes, format: str = "lines", field: str = "text") -> TextFile:
    path.write_bytes(data)
    return TextFile.scan(path, format, field)  # type: ignore[arg-type]


def all_texts(file: TextFile) -> list[str]:
    return [text for chunk in file.chunks(0, 0, 512) for text in chunk.texts]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"one\n\nthree", ["one", "", "three"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
        ("a\u2028b\x0bc\x85d\rz\ne\n".encode(), ["a\u2028b\x0bc\x85d\rz", "e"]),
    ],
)
def test_row_i_is_line_i(tmp_path: Path, data: bytes, texts: list[str]) -> None:
    file = scan(tmp_path / "in.txt", data)
    assert file.rows == len(texts)
    assert all_texts(file) == texts


def test_jsonl_field(tmp_path: Path) -> None:
    file = scan(tmp_path / "in", b'{"body": "one\\n1"}\n{"id": 3, "body": ""}\n', "jsonl", "body")
    assert all_texts(file) == ["one\n1", ""]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "need one JSON object"),
        (b"", "an empty line"),
        (b"[" * 100_000, "need one JSON object"),
        (b'["text"]', "got a JSON list"),
        (b'{"body": "x"}', "try --field"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": 5}', "int"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "0xff at column 11"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: bytes, words: str) -> None:
    with pytest.raises(EmbedError, match=r"line 2: ") as error:
        scan(tmp_path / "in", b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n', "jsonl")
    assert words in str(error.value)


def test_bad_utf8_names_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(EmbedError, match=r"line 3: got byte 0xe9 at column 4, need UTF-8"):
        scan(tmp_path / "in", b"one\ntwo\ncaf\xe9\n")


def test_input_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(EmbedError, match="does not exist"):
        TextFile.scan(tmp_path / "none", "lines")
    with pytest.raises(EmbedError, match="not a regular file"):
        TextFile.scan(tmp_path, "lines")


def test_chunks_are_cut_the_same_from_every_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(textfile, "CHUNK_ROWS", 7)
    monkeypatch.setattr(textfile, "CHUNK_BYTES", 330)
    lines = [sentence(i) for i in range(100)]
    file = scan(tmp_path / "in", "\n".join(lines).encode())
    chunks = list(file.chunks(0, 0, 512))
    assert [text for chunk in chunks for text in chunk.texts] == lines
    assert max(len(chunk.texts) for chunk in chunks) == 7
    assert min(len(chunk.texts) for chunk in chunks[:-1]) < 7  # the byte bound cuts, too
    for done in range(len(chunks)):
        row = chunks[done].first_row + len(chunks[done].texts)
        assert list(file.chunks(chunks[done].end_offset, row, 512)) == chunks[done + 1 :]


def test_input_that_changes_is_noticed(tmp_path: Path) -> None:
    file = scan(tmp_path / "in", b"one\ntwo\n")
    with (tmp_path / "in").open("ab") as more:
        more.write(b"three\n")
    with pytest.raises(EmbedError, match="changed while it was read"):
        all_texts(file)


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
    np.testing.assert_allclose(np.load(job.output), expected, rtol=0, atol=2e-6)


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


# Files out


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "CHUNK_ROWS", 9)
    monkeypatch.setattr(rowstore, "ROW_GROUP", 16)


class InstantEmbedder:
    """Rows that depend on the text and the pooling alone, with no model behind them."""

    dimension, max_length = 3, 48

    def __init__(self, pooling: str | None) -> None:
        self.sign = -1.0 if pooling == "cls" else 1.0

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[0, *text.encode(), 0] for text in texts]

    def embed_ids(
        self, ids: list[list[int]], batches: list[list[int]], on_batch: Callable[[int, int], None]
    ) -> np.ndarray:
        on_batch(len(ids), sum(map(len, ids)))
        rows = [[len(one), sum(one), hash(tuple(one)) % 1000] for one in ids]
        return self.sign * np.array(rows, dtype=np.float32)


class Killed(BaseException):
    """Not an Exception, so that nothing on the way tidies up as it would for an error."""


def die(store: RowStore) -> None:
    """Closes as a kill does: what Python still held in its buffer is gone."""
    if store._file is not None:
        store._file.raw.close()  # type: ignore[attr-defined]
        store._file = None


def stop_at(step: int, call: Callable[..., None], calls: itertools.count[int]) -> Callable:
    """``call``, stopped before its k-th use at step ``2 k`` and after it at ``2 k + 1``."""

    def cut(*args: object) -> None:
        number = next(calls)
        if number * 2 == step:
            raise Killed
        call(*args)
        if number * 2 + 1 == step:
            raise Killed

    return cut


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("before", ["nothing", "other job", "same job"])
def test_stopped_at_every_step_and_continued(
    job: EmbedJob, monkeypatch: pytest.MonkeyPatch, suffix: str, before: str
) -> None:
    """Stops a run before and after its k-th fsync or rename, for every k, and runs it again.

    Beneath a ``--restart`` lies the finished output of another job, or of the same one.
    """
    small_chunks(monkeypatch)
    monkeypatch.setattr(Embedder, "load", lambda *args, pooling, **kwargs: InstantEmbedder(pooling))
    # A process that dies loses nothing it has given to the system: no disk need take part.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    fsync, rename = os.fsync, os.replace
    folder = job.output.parent
    job = replace(job, output=folder / f"whole{suffix}")
    assert run_job(job).new_rows == 40
    whole = job.output.read_bytes()
    old = replace(job, pooling="cls", output=folder / f"old{suffix}")
    run_job(old)
    beneath = {"nothing": None, "other job": old.output, "same job": job.output}[before]
    complete_at_once = 0
    for step in itertools.count():
        output = folder / f"cut{step}{suffix}"
        state_path = Path(f"{output}.state.json")
        cut = replace(job, output=output, restart=beneath is not None)
        if beneath is not None:
            shutil.copy(beneath, output)
            shutil.copy(f"{beneath}.state.json", state_path)
        calls = itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", stop_at(step, fsync, calls))
            patch.setattr(os, "replace", stop_at(step, rename, calls))
            patch.setattr(RowStore, "close", die)
            try:
                run_job(cut)
            except Killed:
                pass
            else:
                break  # every step has been cut once
        if output.exists():
            allowed = [whole] if beneath is None else [whole, beneath.read_bytes()]
            assert output.read_bytes() in allowed, f"half an output after step {step}"
        state = json.loads(state_path.read_text()) if state_path.exists() else None
        begun = state is not None and state["identity"]["pooling"] == "mean"
        result = run_job(replace(cut, restart=not begun))
        assert output.read_bytes() == whole, f"wrong output after step {step}"
        assert result.new_rows == (40 - state["rows_done"] if begun else 40)
        complete_at_once += result.already_complete
        assert run_job(replace(cut, restart=False)).already_complete
        left = sorted(path.name for path in folder.glob(f"cut{step}.*"))
        assert left == [output.name, state_path.name]
    assert step > 20
    assert complete_at_once >= 3  # cut around the last rename


def test_resumed_run_does_only_the_rest(job: EmbedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)
    append = RowStore.append
    done = itertools.count(1)

    def append_twice(self: RowStore, rows: np.ndarray, offset: int) -> None:
        append(self, rows, offset)
        if next(done) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "append", append_twice)
        with pytest.raises(Killed):
            run_job(job)
    assert not job.output.exists()
    result = run_job(job)
    assert (result.rows, result.new_rows) == (40, 22)


def test_complete_output_is_left_alone(job: EmbedJob) -> None:
    assert not run_job(job).already_complete
    before = job.output.stat()
    result = run_job(job)
    assert (result.already_complete, result.rows, result.dimension) == (True, 40, 64)
    assert job.output.stat().st_mtime_ns == before.st_mtime_ns
    job.output.unlink()
    assert not run_job(job).already_complete


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pooling": "cls"}, "pooling was mean, now cls"),
        ({"max_length": 12}, "max-length was unset, now 12"),
        ({"batch_size": 4}, "batch-size was unset, now 4"),
        ({"dtype": "bfloat16"}, "dtype was float32, now bfloat16"),
        ({"normalize": True}, "normalize was False, now True"),
    ],
)
def test_other_options_are_not_mixed_in(
    job: EmbedJob, change: dict[str, object], words: str
) -> None:
    run_job(job)
    before = job.output.read_bytes()
    with pytest.raises(EmbedError, match="--restart") as error:
        run_job(replace(job, **change))
    assert words in str(error.value)
    assert job.output.read_bytes() == before
    assert run_job(replace(job, **change, restart=True)).new_rows == 40
    assert run_job(replace(job, **change)).already_complete


def test_other_text_and_other_model_are_noticed(job: EmbedJob, tmp_path: Path) -> None:
    run_job(job)
    text = job.input.read_bytes()
    os.utime(job.input, (1, 1))
    assert run_job(job).already_complete  # the content counts, not the date
    job.input.write_bytes(text.replace(b"cat", b"dog", 1))
    with pytest.raises(EmbedError, match="input sha256 was"):
        run_job(job)
    job.input.write_bytes(text)
    other = save_tiny_bert(tmp_path / "other", intermediate_size=96)
    with pytest.raises(EmbedError, match="model sha256 was"):
        run_job(replace(job, model=other))


def test_somebody_elses_output_is_not_replaced(job: EmbedJob) -> None:
    job.output.write_bytes(b"precious")
    with pytest.raises(EmbedError, match="exists and has no"):
        run_job(job)
    assert job.output.read_bytes() == b"precious"
    run_job(replace(job, restart=True))
    assert np.load(job.output).shape == (40, 64)
    job.output.write_bytes(b"precious")
    with pytest.raises(EmbedError, match="something changed it"):
        run_job(job)


def test_damaged_leftovers_are_refused(job: EmbedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)

    def stop(store: RowStore) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "finish", stop)
        with pytest.raises(Killed):
            run_job(job)
    partial, state = Path(f"{job.output}.partial"), Path(f"{job.output}.state.json")
    os.truncate(partial, partial.stat().st_size - 1)
    with pytest.raises(EmbedError, match="changed or cut"):
        run_job(job)
    state.write_text("{}", encoding="utf-8")
    with pytest.raises(EmbedError, match="cannot be read"):
        run_job(job)
    run_job(replace(job, restart=True))
    assert np.load(job.output).shape == (40, 64)


@pytest.mark.skipif(os.name != "posix", reason="file locks are used on POSIX systems only")
def test_two_runs_at_once(job: EmbedJob) -> None:
    store = RowStore(job.output, {}, 40)
    store.begin(64, resume=False)
    with pytest.raises(EmbedError, match="another process is writing"):
        run_job(replace(job, restart=True))
    store.close()
    run_job(replace(job, restart=True))


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_no_texts(job: EmbedJob, suffix: str) -> None:
    job.input.write_bytes(b"")
    job = replace(job, output=job.output.with_suffix(suffix))
    assert run_job(job).rows == 0
    assert run_job(job).already_complete
    if suffix == ".npy":
        assert np.load(job.output).shape == (0, 64)


def test_parquet_holds_the_same_rows(job: EmbedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    small_chunks(monkeypatch)
    run_job(job)
    table_job = replace(job, output=job.output.with_suffix(".parquet"))
    run_job(table_job)
    file = pyarrow.parquet.ParquetFile(table_job.output)
    assert file.num_row_groups == 3
    table = file.read()
    assert table["row"].to_pylist() == list(range(40))
    rows = np.stack(table["embedding"].to_numpy())
    assert np.array_equal(rows, np.load(job.output))


def test_output_names(job: EmbedJob, tmp_path: Path) -> None:
    for output, words in [
        (tmp_path / "out.txt", "ends in .npy or .parquet"),
        (tmp_path / "no" / "out.npy", "does not exist"),
        (tmp_path / "folder.npy", "which is a folder"),
    ]:
        (tmp_path / "folder.npy").mkdir(exist_ok=True)
        with pytest.raises(EmbedError, match=words):
            run_job(replace(job, output=output))
