"""What ``filbert embed`` reads: row i is line i, and a bad line is named."""

from __future__ import annotations

import codecs
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from filbert.app import textfile
from filbert.app.textfile import EmbedError, TextFile
from tiny_model import sentence


def scan(path: Path, data: bytes, format: Any = "lines", field: str | None = None) -> TextFile:
    path.write_bytes(data)
    return TextFile.scan(path, format, field)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_names_the_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """As PowerShell writes. U+0A0A, U+0A0D and U+000A next to it are ends of lines byte by byte."""
    monkeypatch.setattr(textfile, "CHUNK_ROWS", 2)
    lines = ["na\u00efve", "", "\u0a0a\u0d0a\u0a00 \u010a", "\U0001f600" * 40_000, "last"]
    data = ("\ufeff" + "\r\n".join(lines)).encode(encoding)
    file = scan(tmp_path / "in.txt", data, None)
    assert file.rows == len(lines)
    assert all_texts(file) == lines
    chunks = list(file.chunks(0, 0, 512))
    assert list(file.chunks(chunks[0].end_offset, 2, 512)) == chunks[1:]
    records = '\ufeff{"text": "one"}\n{"text": "\u0a0atwo"}\n'.encode(encoding)
    assert all_texts(scan(tmp_path / "in.jsonl", records, None)) == ["one", "\u0a0atwo"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize(
    "text",
    ["plain words", "caf\u00e9 cr\u00e8me", "\u043f\u0440\u0438\u0432\u0435\u0442", "\u4f60\u597d"],
)
def test_wide_characters_without_a_mark_are_refused_by_their_name(
    tmp_path: Path, text: str, encoding: str, suffix: str
) -> None:
    data = f'{{"text": "{text}"}}\r\n{{"text": "{text}"}}\r\n'.encode(encoding)
    with pytest.raises(
        EmbedError, match=f"looks like {encoding} without a byte order mark"
    ) as error:
        scan(tmp_path / f"in.{suffix}", data, None)
    assert f"try: iconv -f {encoding} -t UTF-8 in.{suffix} > utf8-in.{suffix}" in str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"caf\xe9\n", "cannot be told from its bytes; .* iconv -f WINDOWS-1252 -t UTF-8 in.txt"),
        (b"one\0two\nthree\n", "line 1: got a NUL at column 4, need text"),
        (b"one\n" * 9 + "two\r\n".encode("utf-16-le"), "line 10: got a NUL .* PowerShell"),
        (codecs.BOM_UTF16_LE + b"a\0b", "which is not UTF-16-LE, the encoding that .* name"),
        (b"\x1f\x8b\x08\0" + bytes(range(256)), "a gzip file; .* gunzip -k in.txt"),
        (b"PK\3\4\x14\0\6\0" + bytes(range(256)), "a zip file .as .docx"),
        (b"PAR1\x15\x04\x15\xe0" + bytes(range(256)), "a parquet file"),
    ],
)
def test_what_is_no_text_is_called_by_its_name(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(EmbedError, match=words) as error:
        scan(tmp_path / "in.txt", data, None)
    assert "LATIN1" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "format", "field", "words"),
    [
        ("in.txt", "one", None, "body", "--field body, and the input is read as lines .its name"),
        ("in.jsonl", "{}", "lines", "body", r"read as lines \(--format lines\)"),
        ("in.txt", '{"body": "x"}', None, None, "JSON dict in a file .* try --format jsonl"),
        (
            "in.txt",
            '[{"body": "x"}]',
            None,
            None,
            "JSON list in a file .* try --format lines to .* or JSON lines; try: python",
        ),
        ("in.json", '[\n{"text": "x"}]', None, None, "need one JSON object per line; a JSON array"),
        ("in.json", '[{"text": "x"}]', None, None, "JSON list, need a JSON object per line"),
        ("in.csv", "text\none", None, None, "a table by its name"),
    ],
)
def test_json_and_tables_are_not_embedded_as_source(
    tmp_path: Path, name: str, data: str, format: str | None, field: str | None, words: str
) -> None:
    with pytest.raises(EmbedError, match=words):
        scan(tmp_path / name, data.encode(), format, field)
    if format is None:  # and where somebody says that the source is meant, it is
        assert all_texts(scan(tmp_path / name, data.encode(), "lines")) == data.split("\n")


@pytest.mark.parametrize("line", ["[1] Smith, 1999", "{not json}", "[1, 2]", "[]"])
def test_text_that_only_begins_like_json_is_text(tmp_path: Path, line: str) -> None:
    assert all_texts(scan(tmp_path / "in.txt", line.encode(), None)) == [line]


@pytest.mark.parametrize(
    ("name", "data", "field"),
    [
        ("in put.json", '[{"text": "one\\n1"},\n {"text": "two"}]', "text"),
        ("in.json", '["one\\n1", "two"]', "text"),
        ("in.csv", 'id,body\n1,"one\n1"\n2,two\n', "body"),
        ("in.tsv", 'id\tbody\n1\t"one\n1"\n2\ttwo\n', "body"),
    ],
)
def test_the_advised_command_makes_json_lines(
    tmp_path: Path, name: str, data: str, field: str
) -> None:
    with pytest.raises(EmbedError) as error:
        scan(tmp_path / name, data.encode(), None)
    words = shlex.split(str(error.value).rpartition("try: ")[2])
    assert words[:2] == ["python", "-c"]
    assert words[3] == ">"
    done = subprocess.run(
        [sys.executable, *words[1:3]], cwd=tmp_path, capture_output=True, check=True
    )
    file = scan(tmp_path / words[4], done.stdout, None, field)
    assert all_texts(file) == ["one\n1", "two"]


def test_input_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(EmbedError, match="does not exist"):
        TextFile.scan(tmp_path / "none")
    with pytest.raises(EmbedError, match="not a regular file"):
        TextFile.scan(tmp_path)


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
