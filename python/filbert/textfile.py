"""Text in: a file of lines or of JSON records, read in pieces and never held whole."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

__all__ = ["Chunk", "EmbedError", "TextFile"]

#: a chunk is what one journal entry of the output covers: at most this many texts ...
CHUNK_ROWS = 4096
#: ... and about this many bytes of text (64 thousand tokens: seconds to a minute of work)
CHUNK_BYTES = 256 * 1024


class EmbedError(ValueError):
    """A job that cannot be done as asked. The message says what, got, need and try."""


@dataclass(frozen=True)
class Chunk:
    """Neighbouring texts of the input: ``texts``, the row of the first, the byte after the last."""

    first_row: int
    texts: list[str]
    end_offset: int


@dataclass(frozen=True)
class TextFile:
    """An input file that has been read through once, counted and hashed.

    Row ``i`` is line ``i`` of the file; lines end at ``\\n`` (a ``\\r`` before it is dropped) and
    nowhere else, as ``wc -l`` and ``grep -n`` count them. An empty line is an empty text.
    """

    path: Path
    format: Literal["lines", "jsonl"]
    field: str
    rows: int
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def scan(cls, path: Path, format: Literal["lines", "jsonl"], field: str = "text") -> TextFile:
        """Reads the whole file once, so that a bad line 900000 is reported now, not tomorrow.

        Raises:
            EmbedError: not a regular file, not UTF-8, or (jsonl) a line that is not a JSON object
                with a string in ``field``; the message names the line, counted from 1.
        """
        if not path.exists():
            raise EmbedError(f"input: got {path}, which does not exist; need a text file")
        if not path.is_file():
            raise EmbedError(
                f"input: got {path}, which is not a regular file; need a file that can be read "
                "twice (to count, then to embed); try saving the text to a file first"
            )
        digest = hashlib.sha256()
        rows = 0
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            for raw in file:
                digest.update(raw)
                rows += 1
                _decode(raw, rows, path, format, field)
        return cls(path, format, field, rows, before.st_size, before.st_mtime_ns,
                   digest.hexdigest())  # fmt: skip

    def chunks(self, offset: int, first_row: int, max_length: int) -> Iterator[Chunk]:
        """Yields the texts from byte ``offset`` (the start of row ``first_row``) to the end.

        Where chunks end depends on the text alone, so a resumed run cuts them as the first did.
        ``max_length`` is in tokens: what a text has beyond it is truncated and costs no work.

        Raises:
            EmbedError: the file changed after :meth:`scan`.
        """
        cap = 8 * max_length
        with self.path.open("rb") as file:
            self._check_unchanged(file)
            file.seek(offset)
            texts: list[str] = []
            size = 0
            for raw in file:
                row = first_row + len(texts)
                texts.append(_decode(raw, row + 1, self.path, self.format, self.field))
                offset += len(raw)
                size += min(len(raw), cap)
                if len(texts) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                    self._check_unchanged(file)
                    yield Chunk(first_row, texts, offset)
                    first_row, texts, size = first_row + len(texts), [], 0
            self._check_unchanged(file)
            if texts:
                yield Chunk(first_row, texts, offset)

    def identity(self) -> dict[str, Any]:
        """What of the input decides an output made from it."""
        return {
            "input sha256": self.sha256,
            "input rows": self.rows,
            "input format": self.format,
            "input field": self.field if self.format == "jsonl" else None,
        }

    def _check_unchanged(self, file: IO[bytes]) -> None:
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise EmbedError(
                f"input: {self.path} changed while it was read; need a file that stays as it is; "
                "try again with --restart once nothing writes to it"
            )


def _decode(raw: bytes, number: int, path: Path, format: str, field: str) -> str:
    """The text of line ``number`` (from 1)."""
    where = f"input: {path}, line {number}"
    if number == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        line = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise EmbedError(
            f"{where}: got byte 0x{raw[error.start]:02x} at column {error.start + 1}, need UTF-8; "
            f"try: iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from None
    if format == "lines":
        return line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number too long to read
        got = f"{line[:60]!r} ({error})" if line else "an empty line"
        raise EmbedError(f"{where}: got {got}, need one JSON object per line") from None
    if not isinstance(record, dict):
        raise EmbedError(f"{where}: got a JSON {type(record).__name__}, need a JSON object")
    if field not in record:
        raise EmbedError(
            f"{where}: got the fields {sorted(record)[:10]}, need {field!r}; try --field NAME"
        )
    text = record[field]
    if not isinstance(text, str):
        raise EmbedError(f"{where}: got {type(text).__name__} in field {field!r}, need a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise EmbedError(
            f"{where}: got a lone surrogate (half a character) at position {error.start} of field "
            f"{field!r}, need text that can be written as UTF-8"
        ) from None
    return text
