"""One writer per output: a lock beside it that dies with its process.

``OUTPUT.lock`` is there while a job is at work on ``OUTPUT`` and says who that is. What protects is
not the file but the system's lock on it (``flock``), which a kill releases. Some network folders
know no such locks, and Windows has no ``flock``: there the file itself protects, since only one
process can create it. Such a file outlives a kill. It is taken over where it was left on this
machine by a process that has ended, and refused in words where that cannot be told.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from .textfile import EmbedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["OutputLock"]

#: seconds that a lock may exist before its owner has written who it is
WRITE_S = 0.5


class OutputLock:
    """The right to read and write what belongs to ``output``, for one process at a time.

    Everything that decides what a job does (the journal, the output, leftovers) is to be read
    after :meth:`acquire`: before, another job may be about to change it.

    Args:
        output: the final name; the lock is ``OUTPUT.lock`` beside it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".lock")
        #: open while the system's lock is held; None also where the file itself protects
        self._handle: int | None = None
        #: what this process wrote into the file
        self._record: dict[str, Any] | None = None
        self._refused: OSError | None = None

    def acquire(self) -> OutputLock:
        """Takes the lock or raises; never waits for another job.

        In a folder where nothing may be written the lock cannot exist. Then a finished output may
        still be looked at, and :meth:`require` raises before anything is written.

        Raises:
            EmbedError: another process has it; the message says which.
            OSError: the lock file can be neither made nor opened, and not for lack of rights.
        """
        try:
            if self._locks_work():
                self._by_system()
            else:
                self._by_creation()
        except OSError as error:
            self.release()
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            self._refused = error
        return self

    def release(self) -> None:
        """Removes the lock; safe to call twice, and where :meth:`acquire` has failed."""
        handle, record = self._handle, self._record
        self._handle = self._record = None
        if record is not None and self._read() in (record, {}):
            # Under the system's lock: whoever has opened the file before finds it without a name.
            self.path.unlink(missing_ok=True)
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)  # closing would not, where a fork holds it too
            os.close(handle)

    def require(self) -> None:
        """Raises the reason why this process may write nothing, if there is one."""
        if self._refused is not None:
            raise self._refused
        if self._record is None:
            raise RuntimeError(f"{self.path} is not held; call acquire() first")

    def __enter__(self) -> OutputLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _locks_work(self) -> bool:
        """Whether files in this folder can be locked, tried on one without a name."""
        if fcntl is None:
            return False
        try:
            probe = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 - closed below
        except OSError as error:
            error.filename = str(self.path)
            raise
        with probe:
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            return True

    def _by_system(self) -> None:
        """Locks the file."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                named = _names(handle, self.path)
            except OSError as error:
                os.close(handle)
                if not isinstance(error, BlockingIOError):
                    raise
                raise self._taken() from None
            if named:
                break
            os.close(handle)  # its owner has removed it between the two calls
        # It may protect by being there: for a machine that finds no locks in this folder.
        left = self._read()
        if left.get("locked") is False and not _has_ended(left):
            os.close(handle)
            raise self._taken()
        self._handle = handle
        self._write(handle, locked=True)

    def _by_creation(self) -> None:
        """Creates the file, which only one process can; takes over what a dead one left."""
        for _ in range(2):
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if not _has_ended(self._read()):
                    raise self._taken() from None
                self._remove_dead()
                continue
            try:
                self._write(handle, locked=False)
            finally:
                os.close(handle)
            return
        raise self._taken()

    def _remove_dead(self) -> None:
        """Removes what a dead process left.

        One process at a time: a second could remove what the first has put in its place.
        """
        turn = self.path.with_name(self.path.name + ".takeover")
        try:
            os.close(os.open(turn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            raise EmbedError(
                f"output: another process is taking over {self.path} right now; need one at a "
                f"time; try again; if {turn} stays, delete it"
            ) from None
        try:
            if _has_ended(self._read()):
                self.path.unlink()
        finally:
            turn.unlink()

    def _write(self, handle: int, *, locked: bool) -> None:
        self._record = {
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            **_this_machine(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "locked": locked,
            "token": secrets.token_hex(8),
        }
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(self._record).encode())

    def _read(self) -> dict[str, Any]:
        """What the file says about its owner; empty where it says nothing."""
        try:
            owner = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _taken(self) -> EmbedError:
        """The error that says who has it."""
        # An owner locks first and then writes: until it has, the file is empty or speaks of one
        # that was killed before.
        end = time.monotonic() + WRITE_S
        while True:
            owner = self._read()
            known = "pid" in owner and not _has_ended(owner)
            if known or time.monotonic() > end:
                break
            time.sleep(0.01)
        who = "another process"
        if known:
            who += f" ({owner['pid']} on {owner.get('host')}, since {owner.get('since')})"
        hint = "try again when it has ended, or another output name"
        if not owner.get("locked"):
            hint += f"; if it has ended and {self.path} is still there, delete that file"
        return EmbedError(
            f"output: {who} is writing {self.output} right now; need one at a time; {hint}"
        )


def _names(handle: int, path: Path) -> bool:
    """Whether ``path`` is still the name of the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _this_machine() -> dict[str, Any]:
    """What two processes share if one can see whether the other lives."""
    boot = namespace = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - a link to no path
    return {"host": platform.node(), "boot": boot, "namespace": namespace}


def _started(pid: int) -> str | None:
    """When a living process started, so that a later one with its number is told from it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _has_ended(owner: dict[str, Any]) -> bool:
    """True only where it is certain: a process of this machine that is no more."""
    here = _this_machine()
    if here["boot"] is None or any(owner.get(name) != value for name, value in here.items()):
        return False
    return "pid" in owner and _started(owner["pid"]) != owner.get("started")
