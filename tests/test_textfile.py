"""What ``filbert embed`` reads: row i is line i, and a bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from filbert import textfile
from filbert.textfile import EmbedError, TextFile
from tiny_model import sentence


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
