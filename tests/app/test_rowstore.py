"""What ``filbert embed`` writes: whole or not at all, the same bytes however often it was cut."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from filbert.app import rowstore, textfile
from filbert.app.embedder import Embedder
from filbert.app.embedding import EmbedJob, run_job
from filbert.app.outputlock import OutputLock
from filbert.app.rowstore import RowStore
from filbert.app.textfile import EmbedError
from instant_embedder import InstantEmbedder
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


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "CHUNK_ROWS", 9)
    monkeypatch.setattr(rowstore, "ROW_GROUP", 16)


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


@pytest.mark.parametrize("finished", [False, True], ids=["before the end", "at the end"])
def test_a_file_that_another_program_wrote_meanwhile(
    job: EmbedJob, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """It knows nothing of locks: its file stays, and the rows wait in the partial file."""

    def meanwhile(store: RowStore) -> None:
        job.output.write_bytes(b"precious")
        if not finished:
            raise Killed
        finish(store)

    finish = RowStore.finish
    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "finish", meanwhile)
        with pytest.raises(EmbedError if finished else Killed):
            run_job(job)
    for _ in range(2):
        with pytest.raises(EmbedError, match="was written by something else after this job began"):
            run_job(job)
    assert job.output.read_bytes() == b"precious"
    job.output.unlink()
    assert run_job(job).new_rows == 0
    assert np.load(job.output).shape == (40, 64)


def test_rows_are_written_only_under_the_lock(job: EmbedJob) -> None:
    store = RowStore(OutputLock(job.output), {}, 40)
    with pytest.raises(RuntimeError, match="is not held"):
        store.begin(64, resume=False)


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
