"""The command line: exit codes, words, and a job that survives ``kill -9``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import filbert
from filbert.app.cli import main
from tiny_model import python_command, python_environment, save_tiny_bert, sentence

ROWS = 6_500


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and an input that takes a few seconds to embed."""
    place = tmp_path_factory.mktemp("cli")
    save_tiny_bert(place / "model", num_hidden_layers=1)
    lines = "\n".join(sentence(i) for i in range(ROWS))
    (place / "texts.txt").write_text(lines, encoding="utf-8")
    (place / "few.txt").write_text("the cat\n\nsat on the mat\n", encoding="utf-8")
    return place


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    """A process that hears Ctrl-C, even where this one does not: in the background of a script."""
    return subprocess.Popen(
        python_command("-m", "filbert.app.cli", *words),
        cwd=place,
        env=python_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop_midway(place: Path, name: str, how: signal.Signals) -> tuple[int, str, dict[str, object]]:
    """Starts the job and sends ``how`` once the journal names rows; returns what was left."""
    state_path = place / f"{name}.state.json"
    process = start(place, "embed", "model", "texts.txt", name)
    deadline = time.monotonic() + 120
    while True:
        state = json.loads(state_path.read_text()) if state_path.exists() else {"rows_done": 0}
        if state["rows_done"]:
            process.send_signal(how)
            break
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "no chunk was finished in two minutes"
        time.sleep(0.002)
    _, words = process.communicate(timeout=60)
    return process.returncode, words, json.loads(state_path.read_text())


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_kill_9_and_again_gives_the_same_bytes(place: Path) -> None:
    whole = start(place, "embed", "model", "texts.txt", "whole.npy")
    said, words = whole.communicate(timeout=300)
    assert whole.returncode == 0, words
    assert f"{ROWS:,} embeddings of 64 values" in said
    assert "100%" in words  # the progress bar, on stderr

    code, _, state = stop_midway(place, "cut.npy", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 0 < state["rows_done"] < ROWS
    assert not (place / "cut.npy").exists()
    assert (place / "cut.npy.lock").exists()  # and stops nobody
    again = start(place, "embed", "model", "texts.txt", "cut.npy")
    said, words = again.communicate(timeout=300)
    assert again.returncode == 0, words
    assert f"{state['rows_done']:,} texts from an earlier run" in said
    assert (place / "cut.npy").read_bytes() == (place / "whole.npy").read_bytes()
    left = {path.name for path in place.glob("cut.npy*")}
    assert left == {"cut.npy", "cut.npy.state.json"}


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_ctrl_c_leaves_a_hint_and_a_state(place: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, words, state = stop_midway(place, "stopped.npy", signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert "the same command continues it" in words
    assert "Traceback" not in words
    assert 0 < state["rows_done"] < ROWS
    assert not (place / "stopped.npy").exists()


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_embed_then_nothing_to_do(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("embed", place / "model", place / "few.txt", tmp_path / "few.npy", "--normalize")
    code, out, err = run(capsys, *words)
    assert (code, "3 embeddings of 64 values" in out) == (0, True), err
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "few.npy"), axis=1), 1, atol=1e-6)
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "already complete" in out
    code, out, err = run(capsys, *words[:-1], "--no-normalize")
    assert code == 1
    assert "normalize was True, now False" in err
    assert err.count("\n") == 1
    code, out, err = run(capsys, *words[:-1], "--no-normalize", "--restart", "--quiet")
    assert (code, out, err) == (0, "", "")


def test_jsonl_and_parquet(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow.parquet

    records = [{"body": line} for line in ["the cat", "", "sat on the mat"]]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    model = place / "model"
    code, _, err = run(
        capsys, "embed", model, source, tmp_path / "a.parquet", "--field", "body", "--batch-size", 1
    )
    assert code == 0, err
    run(capsys, "embed", model, place / "few.txt", tmp_path / "b.npy")
    rows = np.stack(pyarrow.parquet.read_table(tmp_path / "a.parquet")["embedding"].to_numpy())
    np.testing.assert_allclose(rows, np.load(tmp_path / "b.npy"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embed", "m", "i.txt"], "OUTPUT"),
        (["embed", "m", "i.txt", "o.txt"], "need a name in .npy or .parquet"),
        (["embed", "m", "i.txt", "o.npy", "--batch-size", "0"], "a whole number above 0"),
        (["embed", "m", "i.txt", "o.npy", "--threads", "two"], "a whole number above 0"),
        (
            ["embed", "m", "i.txt", "o.npy", "--batch-size", "1", "--batch-tokens", "9"],
            "not allowed",
        ),
        (["embed", "m", "i.txt", "o.npy", "--pooling", "max"], "invalid choice: 'max'"),
        (["embed", "m", "i.txt", "o.npy", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_wrong_usage_is_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("model", "source", "said"),
    [
        ("bert-base-uncased", "few.txt", "nothing is downloaded"),
        ("few.txt", "few.txt", "which is a file"),
        (".", "few.txt", "has no config.json"),
        ("model", "none.txt", "does not exist"),
        ("model", "model", "not a regular file"),
    ],
)
def test_failure_is_1_in_one_line(
    place: Path,
    tmp_path: Path,
    model: str,
    source: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    code, out, err = run(capsys, "embed", model, source, tmp_path / "out.npy")
    assert (code, out) == (1, "")
    assert err.startswith("filbert embed: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_error_that_can_be_mended(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from filbert.app.rowstore import RowStore

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    words = ("embed", place / "model", place / "few.txt", tmp_path / "out.npy", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(RowStore, "append", full)
        code, _, err = run(capsys, *words)
    assert code == 1
    assert "No space left on device; what was done is kept" in err
    assert run(capsys, *words) == (0, "", "")


def test_model_that_cannot_be_converted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder: every reason in words, exit status 1, and the way out works."""
    import shutil

    from transformers import GPT2Config, GPT2Model

    folder = shutil.copytree(place / "model", tmp_path / "gpt2")
    config = GPT2Config(vocab_size=200, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    GPT2Model(config).save_pretrained(folder)
    capsys.readouterr()
    words = ("embed", folder, place / "few.txt", tmp_path / "out.npy", "--quiet")
    code, _, err = run(capsys, *words)
    assert code == 1
    assert err.startswith("filbert embed: error: ")
    assert "Traceback" not in err
    assert run(capsys, *words, "--no-convert") == (0, "", "")


def test_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "report", place / "model")
    assert code == 0, err
    assert "encoder" in out


def test_info_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert (code, out) == (0, f"filbert {filbert.__version__}\n")
    code, out, _ = run(capsys, "info")
    assert code == 0
    assert filbert.__version__ in out
    assert "float16   float32 rows: filbert linear_dense" in out


def test_command_line_is_light() -> None:
    """Help must not wait for transformers, nor need the packages of one command."""
    program = (
        "import sys, filbert.app.cli; filbert.app.cli.main(['embed', '--help']); "
        "print([n for n in ('transformers', 'pyarrow') if n in sys.modules])"
    )
    done = subprocess.run(
        python_command("-c", program),
        env=python_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
