"""What an input file is: its format, its encoding, and what to do where it cannot be read as text.

Nothing is guessed in silence: a byte order mark says how to read, a name says which format; where
neither does, the file is refused with what its bytes look like and a command that mends it.
"""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

__all__ = [
    "EmbedError", "Format", "check_first_line", "choose_format", "encoding_of", "raw_lines",
    "why_not_text",
]  # fmt: skip

Format = Literal["lines", "jsonl"]

#: marks at the start of a file; UTF-32's little-endian one begins with UTF-16's
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
#: how files begin that hold no plain text, what they are, and a way to text where there is one
_KINDS = {
    b"\x1f\x8b": ("a gzip file", "gunzip -k {name}"),
    b"BZh": ("a bzip2 file", "bunzip2 -k {name}"),
    b"\xfd7zXZ\0": ("an xz file", "unxz -k {name}"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unzstd {name}"),
    b"PK\3\4": ("a zip file (as .docx and .xlsx are)", "saving its content as plain text"),
    b"PAR1": ("a parquet file", "writing its column of texts as JSON lines"),
    b"%PDF-": ("a PDF file", "pdftotext {name}"),
}
#: bytes that are looked at to tell what a file is
_HEAD = 4096


class EmbedError(ValueError):
    """A job that cannot be done as asked. The message says what, got, need and try."""


def encoding_of(head: bytes) -> tuple[str, bytes]:
    """The encoding that the byte order mark in ``head`` names, else UTF-8, and that mark."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding, mark
    return "utf-8", b""


def raw_lines(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    """Yields the lines of ``file`` from where it stands, each with its ``\\n`` as it is encoded."""
    if encoding == "utf-8":
        yield from file
        return
    newline = "\n".encode(encoding)
    unit = len(newline)
    rest = bytearray()
    seen = 0  # bytes of rest that hold no end of line
    while block := file.read(1 << 16):
        rest += block
        start = 0
        while (at := rest.find(newline, seen)) != -1:
            if (at - start) % unit:  # the end of one character and the start of the next
                seen = at + 1
                continue
            yield bytes(rest[start : at + unit])
            start = seen = at + unit
        del rest[:start]
        seen = max(0, len(rest) - unit + 1)
    if rest:
        yield bytes(rest)


def choose_format(path: Path, format: Format | None, field: str | None) -> Format:
    """The format of ``path``, by its name where ``format`` is None.

    Raises:
        EmbedError: ``field`` is given for a file of lines, or the name is that of a table.
    """
    suffix = path.suffix.lower()
    if format is None and suffix in (".csv", ".tsv"):
        tab = r', delimiter="\t"' if suffix == ".tsv" else ""
        script = (
            "import csv, json; [print(json.dumps(r)) for r in csv.DictReader("
            f'open({json.dumps(path.name)}, encoding="utf-8-sig", newline=""){tab})]'
        )
        raise EmbedError(
            f"input: got {path}, a table by its name; need one text per line, or JSON lines; try "
            "--format lines to embed whole lines, or --field NAME and what this makes of it; "
            f"try: python -c {shlex.quote(script)} > {shlex.quote(path.stem + '.jsonl')}"
        )
    json_name = suffix in (".jsonl", ".ndjson", ".json")
    chosen = format or ("jsonl" if json_name else "lines")
    if chosen == "lines" and field is not None:
        why = "--format lines" if format else f"its name does not end in .jsonl, got {path.name}"
        raise EmbedError(
            f"field: got --field {field}, and the input is read as lines ({why}), which have no "
            "fields; need JSON lines; try --format jsonl, or leave --field out"
        )
    return chosen


def check_first_line(line: str, path: Path) -> None:
    """Refuses to embed JSON source: for a file that is read as lines because nobody said how.

    Raises:
        EmbedError: ``line`` is a JSON object, or a list of objects or strings.
    """
    try:
        value = json.loads(line) if line.lstrip()[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and value and isinstance(value[0], (dict, str)):
        hint = (
            f"try --format lines to embed the JSON source, or JSON lines; {array_hint(path, None)}"
        )
    elif isinstance(value, dict):
        hint = "try --format jsonl (and --field NAME), or --format lines to embed the JSON source"
    else:
        return
    raise EmbedError(
        f"input: {path}, line 1: got a JSON {type(value).__name__} in a file that would be read as "
        f"lines of plain text, by its name; need the format; {hint}"
    )


def array_hint(path: Path, field: str | None) -> str:
    """How one JSON array becomes JSON lines."""
    script = (
        f"import json; [print(json.dumps(r if isinstance(r, dict) else "
        f"{{{json.dumps(field or 'text')}: r}})) for r in json.load("
        f'open({json.dumps(path.name)}, "rb"))]'
    )
    return f"try: python -c {shlex.quote(script)} > {shlex.quote(path.stem + '.jsonl')}"


def why_not_text(path: Path, number: int, got: str) -> EmbedError:
    """The error for line ``number`` (from 1) of a file that is not UTF-8, with its true reason."""
    where = f"input: {path}, line {number}: got {got}"
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for start, (kind, hint) in _KINDS.items():
        if head.startswith(start):
            name = shlex.quote(path.name)
            return EmbedError(
                f"{where}; the file is {kind}; need plain text; try: {hint.format(name=name)}"
            )
    if encoding_of(head)[0] != "utf-8":
        return EmbedError(
            f"{where}, which is not {encoding_of(head)[0].upper()}, the encoding that the file's "
            "first bytes name; need one encoding throughout; try writing the file again"
        )
    if (wide := _wide_encoding(head)) is not None:
        return EmbedError(f"{where}; the file looks like {wide} without a byte order mark; need "
                          f"UTF-8; {_convert(path, wide)}")  # fmt: skip
    if "NUL" in got:
        return EmbedError(
            f"{where}, need text; if UTF-16 was appended to a file of another encoding (as >> of "
            "PowerShell does), try writing the file again in one"
        )
    return EmbedError(
        f"{where}, need UTF-8; which encoding it is cannot be told from its bytes; for Western "
        f"European text from Windows {_convert(path, 'WINDOWS-1252')}; else name the true one there"
    )


def _convert(path: Path, encoding: str) -> str:
    names = shlex.quote(path.name), shlex.quote(f"utf8-{path.name}")
    return f"try: iconv -f {encoding} -t UTF-8 {names[0]} > {names[1]}"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark, told by where the zero bytes of its characters lie."""
    head = head[: len(head) // 4 * 4]
    zeros = [head[i::4].count(0) for i in range(4)]
    if not any(zeros) or (4 * sum(zeros) < len(head) and _is_plain(head.replace(b"\0", b""))):
        return None
    units = len(head) // 4
    if zeros[3] == units and 2 * zeros[2] > units:
        guess = "UTF-32LE"
    elif zeros[0] == units and 2 * zeros[1] > units:
        guess = "UTF-32BE"
    elif zeros[1] + zeros[3] > zeros[0] + zeros[2]:
        guess = "UTF-16LE"
    else:
        guess = "UTF-16BE"
    text = head.decode(guess, "replace")
    fine = sum((char.isprintable() and char != "\ufffd") or char in "\t\r\n" for char in text)
    return guess if fine >= 0.95 * len(text) else None


def _is_plain(head: bytes) -> bool:
    """UTF-8 without control characters, which the halves of wide characters look like."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char >= " " or char in "\t\r\n" for char in text)
