"""Rows out: an array on disk that is written so that a kill loses little and harms nothing.

An output is built beside its final name. ``OUTPUT.partial`` grows by whole chunks of rows, and
``OUTPUT.state.json`` (the journal) says how many of them count. Order makes it safe to stop
anywhere: the rows reach the disk before the journal names them, the journal says *finished* before
the one atomic rename that makes the output appear. Whatever a killed run wrote past the journal is
cut off by the next one. Rows are appended with plain writes, not through a memory map, so that a
full disk is an error one can read and not a SIGBUS. All of it is read and written under the
output's lock, so that no decision rests on what another job is about to change.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from .outputlock import OutputLock
from .textfile import EmbedError

__all__ = ["RowStore", "require_pyarrow"]

#: rows in a parquet row group, and how many are held in memory when one is written
ROW_GROUP = 8192

STATE_VERSION = 1


def require_pyarrow() -> Any:
    """Imports pyarrow, or raises EmbedError saying how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise EmbedError(
            "output: got a .parquet name, need pyarrow to write it, which is not installed; "
            "try: pip install pyarrow, or an output that ends in .npy"
        ) from None
    return pyarrow


def _sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut; Windows has no such call."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(source: Path, target: Path) -> None:
    os.replace(source, target)  # noqa: PTH105 - one name for the tests that stop a run here
    _sync_folder(target.parent)


class RowStore:
    """float32 rows on their way into an output, in order, across any number of runs.

    Args:
        lock: of the output, held from before :meth:`status` to after the last call. The output's
            name ends in ``.npy`` (an array ``[rows, N]``) or ``.parquet`` (columns ``row`` int64
            and ``embedding`` fixed-size list of float32).
        identity: everything that decides the result, as flat JSON values; a run may only continue
            what was begun with the same identity.
        rows: how many rows the finished output has.
    """

    def __init__(self, lock: OutputLock, identity: dict[str, Any], rows: int) -> None:
        self.lock = lock
        self.output = output = lock.output
        self.identity = identity
        self.rows = rows
        self.rows_done = 0
        self.input_offset = 0
        self.dimension = 0
        self.partial = output.with_name(output.name + ".partial")
        self.state_path = output.with_name(output.name + ".state.json")
        self._new_state = output.with_name(output.name + ".state.json.new")
        self.parquet = output.suffix == ".parquet"
        self._ready = output.with_name(output.name + ".ready") if self.parquet else self.partial
        self._file: IO[bytes] | None = None
        #: the output that stood there when this job began, see :func:`_stamp`
        self._beneath: list[int] | None = None

    def status(self) -> Literal["new", "resume", "complete"]:
        """What is on disk for this output; finishes a run that was killed just before its rename.

        Raises:
            EmbedError: what is there belongs to another job, or was changed by somebody else.
        """
        state = self._read_state()
        if state is None:
            if self.output.exists():
                raise EmbedError(
                    f"output: {self.output} exists and has no {self.state_path.name} that says how "
                    "it was made; try another name, or --restart to replace it"
                )
            return "new"
        # The size tells a finished file from one that a killed --restart has just opened.
        ready = self._ready.exists() and self._ready.stat().st_size == state["output_bytes"]
        if state["finished"] and not ready and not self.output.exists():
            return "new"  # a finished output that was moved away
        changes = [
            f"{name} was {_short(state['identity'].get(name))}, now {_short(value)}"
            for name, value in self.identity.items()
            if state["identity"].get(name) != value
        ]
        if changes:
            raise EmbedError(
                f"output: {self.output} was begun by a different job: {'; '.join(changes)}. "
                "Need the same job to continue it; try another output name, or --restart to "
                "begin again and replace it"
            )
        self.dimension = state["dimension"]
        self._beneath = state.get("beneath", _stamp(self.output))
        if not state["finished"]:
            self._check_beneath()
            if not self.partial.exists() or not state["rows_done"]:
                return "new"
            self.rows_done, self.input_offset = state["rows_done"], state["input_offset"]
            return "resume"
        if ready:
            self._publish()
        elif self.output.stat().st_size != state["output_bytes"]:
            raise EmbedError(
                f"output: {self.output} has {self.output.stat().st_size} bytes, need the "
                f"{state['output_bytes']} that were written; something changed it; try --restart"
            )
        self.rows_done = self.rows
        self._tidy()
        return "complete"

    def begin(self, dimension: int, *, resume: bool) -> None:
        """Opens the partial file for rows of ``dimension`` values, cut to what the journal names.

        Raises:
            EmbedError: the partial file is too short.
            OSError: the lock is not held, because nothing may be written here.
        """
        self.lock.require()
        handle = os.open(self.partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        file = self._file = os.fdopen(handle, "r+b")
        if resume:
            end = len(self._header(dimension)) + self.rows_done * dimension * 4
            size = os.fstat(handle).st_size
            if dimension != self.dimension or size < end:
                raise EmbedError(
                    f"output: {self.partial} has {size} bytes, need the {end} that "
                    f"{self.state_path.name} names; it was changed or cut; try --restart"
                )
            file.seek(end)
            file.truncate()
            return
        self.dimension, self.rows_done, self.input_offset = dimension, 0, 0
        self._beneath = _stamp(self.output)
        # The journal goes first: until it names no rows, an older one could claim the new file's.
        self._write_state()
        if self.parquet:
            self._ready.unlink(missing_ok=True)
        file.truncate(0)
        file.write(self._header(dimension))
        self._sync()

    def append(self, rows: np.ndarray, input_offset: int) -> None:
        """Adds ``rows`` ``[n, N]`` float32; once this returns, a kill does not lose them."""
        self._opened.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self._sync()
        self.rows_done += len(rows)
        self.input_offset = input_offset
        self._write_state()

    def finish(self) -> None:
        """Makes the output appear under its final name, whole, at one instant.

        Raises:
            EmbedError: rows are missing, or another program wrote the output meanwhile.
        """
        self._sync()
        if self.rows_done != self.rows:
            raise EmbedError(
                f"input: got {self.rows_done} texts, need the {self.rows} that were counted before"
            )
        if self.parquet:
            self._build_parquet()
        self._write_state(output_bytes=self._ready.stat().st_size)
        self._publish()
        self._tidy()
        self.close()

    def close(self) -> None:
        """Lets go of the partial file; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _opened(self) -> IO[bytes]:
        if self._file is None:
            raise RuntimeError("rows can be added only between begin() and finish()")
        return self._file

    def _publish(self) -> None:
        self.lock.require()
        self._check_beneath()
        _replace(self._ready, self.output)

    def _check_beneath(self) -> None:
        """Other programs know nothing of the lock: what they wrote meanwhile is not replaced."""
        if self.output.exists() and _stamp(self.output) != self._beneath:
            raise EmbedError(
                f"output: {self.output} was written by something else after this job began; need "
                "it out of the way; try moving it and the same command again (the rows are kept), "
                "or --restart to begin again and replace it"
            )

    def _tidy(self) -> None:
        """Removes what a finished job does not need, killed runs' leftovers included."""
        for path in (self.partial, self._ready, self._new_state):
            if path.exists():  # to remove nothing is an error, too, where nothing may be written
                path.unlink(missing_ok=True)

    def _header(self, dimension: int) -> bytes:
        """What stands before the rows: the .npy header, or nothing where parquet is built later."""
        if self.parquet:
            return b""
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f4", "fortran_order": False, "shape": (self.rows, dimension)}
        )
        return buffer.getvalue()

    def _sync(self) -> None:
        self._opened.flush()
        os.fsync(self._opened.fileno())

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            if state["version"] == STATE_VERSION:
                return state
            got = f"version {state['version']}"
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"
        raise EmbedError(
            f"output: {self.state_path} cannot be read (got {got}, need a journal of version "
            f"{STATE_VERSION}); try --restart, or another output name"
        )

    def _write_state(self, output_bytes: int | None = None) -> None:
        state = {
            "version": STATE_VERSION,
            "identity": self.identity,
            "rows": self.rows,
            "dimension": self.dimension,
            "rows_done": self.rows_done,
            "input_offset": self.input_offset,
            "finished": output_bytes is not None,
            "output_bytes": output_bytes,
            "beneath": self._beneath,
        }
        with self._new_state.open("w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _replace(self._new_state, self.state_path)

    def _build_parquet(self) -> None:
        """Rewrites the raw rows as parquet, a row group at a time; doing it twice does no harm."""
        pyarrow = require_pyarrow()
        schema = pyarrow.schema([
            pyarrow.field("row", pyarrow.int64(), nullable=False),
            pyarrow.field(
                "embedding", pyarrow.list_(pyarrow.float32(), self.dimension), nullable=False
            ),
        ])  # fmt: skip
        # Embeddings do not compress and have no repeated values to put in a dictionary.
        with (
            self.partial.open("rb") as raw,
            pyarrow.parquet.ParquetWriter(
                self._ready, schema, compression="NONE", use_dictionary=False
            ) as writer,
        ):
            for first in range(0, self.rows, ROW_GROUP):
                count = min(ROW_GROUP, self.rows - first)
                values = np.fromfile(raw, dtype="<f4", count=count * self.dimension)
                writer.write_table(pyarrow.Table.from_arrays([
                    pyarrow.array(np.arange(first, first + count)),
                    pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), self.dimension),
                ], schema=schema))  # fmt: skip
        with self._ready.open("rb") as file:
            os.fsync(file.fileno())


def _stamp(path: Path) -> list[int] | None:
    """Size and time of a file, which tell whether somebody wrote it; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _short(value: Any) -> str:
    """Hashes are shown by their first digits."""
    text = "unset" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
