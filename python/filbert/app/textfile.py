"""Text in: a file of lines or of JSON records, read in pieces and never held whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from .textformat import (
    EmbedError,
    Format,
    array_hint,
    check_first_line,
    choose_format,
    encoding_of,
    raw_lines,
    why_not_text,
)

__all__ = ["Chunk", "EmbedError", "TextFile"]

#: a chunk is what one journal entry of the output covers: at most this many texts ...
CHUNK_ROWS = 4096
#: ... and about this many bytes of text (64 thousand tokens: seconds to a minute of work)
CHUNK_BYTES = 256 * 1024


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

    The encoding is UTF-8, or what a byte order mark at the start of the file names: UTF-8, UTF-16
    (as PowerShell's ``>`` writes) or UTF-32.
    """

    path: Path
    format: Format
    #: of a JSON line; None for plain lines
    field: str | None
    encoding: str
    #: the byte order mark
    mark: bytes
    rows: int
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def scan(cls, path: Path, format: Format | None = None, field: str | None = None) -> TextFile:
        """Reads the whole file once, so that a bad line 900000 is reported now, not tomorrow.

        Args:
            path: the file.
            format: ``"lines"`` or ``"jsonl"``; None goes by the name.
            field: the field of a JSON line with the text; None is ``"text"``.

        Raises:
            EmbedError: not a regular file, not text, a field asked of plain lines, JSON in a file
                that is read as lines by its name alone, or (jsonl) a line that is not a JSON
                object with a string in ``field``; the message names the line, counted from 1.
        """
        if not path.exists():
            raise EmbedError(f"input: got {path}, which does not exist; need a text file")
        if not path.is_file():
            raise EmbedError(
                f"input: got {path}, which is not a regular file; need a file that can be read "
                "twice (to count, then to embed); try saving the text to a file first"
            )
        chosen = choose_format(path, format, field)
        digest = hashlib.sha256()
        rows = 0
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            encoding, mark = encoding_of(file.read(4))
            found = cls(
                path, chosen, (field or "text") if chosen == "jsonl" else None, encoding, mark,
                rows, before.st_size, before.st_mtime_ns, "",
            )  # fmt: skip
            file.seek(0)
            for raw in raw_lines(file, encoding):
                digest.update(raw)
                rows += 1
                text = found._decode(raw, rows)
                if rows == 1 and format is None and chosen == "lines":
                    check_first_line(text, path)
        return replace(found, rows=rows, sha256=digest.hexdigest())

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
            for raw in raw_lines(file, self.encoding):
                row = first_row + len(texts)
                texts.append(self._decode(raw, row + 1))
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
            "input field": self.field,
        }

    def _check_unchanged(self, file: IO[bytes]) -> None:
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise EmbedError(
                f"input: {self.path} changed while it was read; need a file that stays as it is; "
                "try again with --restart once nothing writes to it"
            )

    def _decode(self, raw: bytes, number: int) -> str:
        """The text of line ``number`` (from 1)."""
        if number == 1:
            raw = raw.removeprefix(self.mark)
        try:
            line = raw.decode(self.encoding).removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            bad = " ".join(f"0x{byte:02x}" for byte in raw[error.start : error.end])
            word = "byte" if error.end - error.start == 1 else "bytes"
            got = f"{word} {bad} at column {error.start + 1}"
            raise why_not_text(self.path, number, got) from None
        if "\0" in line:
            raise why_not_text(self.path, number, f"a NUL at column {line.index(chr(0)) + 1}")
        return line if self.field is None else self._field_of(line, number, self.field)

    def _field_of(self, line: str, number: int, field: str) -> str:
        """The text in a JSON line."""
        where = f"input: {self.path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number too long to read
            got = f"{line[:60]!r} ({error})" if line else "an empty line"
            hint = ""
            if number == 1 and line.startswith("["):
                hint = f"; a JSON array is not: {array_hint(self.path, field)}"
            raise EmbedError(f"{where}: got {got}, need one JSON object per line{hint}") from None
        if not isinstance(record, dict):
            hint = f" per line; {array_hint(self.path, field)}" if isinstance(record, list) else ""
            raise EmbedError(
                f"{where}: got a JSON {type(record).__name__}, need a JSON object{hint}"
            )
        if field not in record:
            raise EmbedError(
                f"{where}: got the fields {sorted(record)[:10]}, need {field!r}; try --field NAME"
            )
        text = record[field]
        if not isinstance(text, str):
            raise EmbedError(
                f"{where}: got {type(text).__name__} in field {field!r}, need a string"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EmbedError(
                f"{where}: got a lone surrogate (half a character) at position {error.start} of "
                f"field {field!r}, need text that can be written as UTF-8"
            ) from None
        return text
