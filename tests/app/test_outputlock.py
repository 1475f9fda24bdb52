"""Two real processes on one output, stopped and continued at every step that the other can see."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from filbert.app import outputlock, textfile
from filbert.app.embedder import Embedder
from filbert.app.embedding import EmbedJob, run_job
from filbert.app.outputlock import OutputLock
from filbert.app.textfile import EmbedError
from instant_embedder import InstantEmbedder
from tiny_model import sentence

fcntl = pytest.importorskip("fcntl", reason="stops processes at the locks of POSIX systems")

#: calls through which one process changes or sees what another sees: where a writer can be stopped
STEPS: list[tuple[Any, str]] = [
    (os, "open"), (os, "replace"), (fcntl, "flock"), (Path, "unlink"), (Path, "read_text"),
]  # fmt: skip


#: where the first is stopped, which has fewer steps than the last, and where the second
FIRST_STEPS, SECOND_STEPS = range(14), (0, 3, 100)


def no_locks(*args: object) -> None:
    raise OSError(37, "No locks available")


def writer(job: EmbedJob, locks: bool, parent: Connection) -> None:
    """A process that runs ``job`` and waits for a word before each of its steps."""
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 - a killed writer's is of no interest
    Embedder.load = lambda *args, pooling, **kwargs: InstantEmbedder(pooling)
    textfile.CHUNK_ROWS = 3
    outputlock.WRITE_S = 0.05
    os.fsync = lambda handle: None
    if not locks:
        fcntl.flock = no_locks
    beside = str(job.output)

    def stopping(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wait_then_call(*args: Any, **kwargs: Any) -> Any:
            if args[1:] == (fcntl.LOCK_EX | fcntl.LOCK_NB,) or str(args[0]).startswith(beside):
                parent.send(f"{name} {Path(str(args[0])).name}")
                parent.recv()
            return call(*args, **kwargs)

        return wait_then_call

    for owner, name in STEPS:
        setattr(owner, name, stopping(name, getattr(owner, name)))
    try:
        run_job(job)
    except EmbedError as error:
        parent.send(error)
    else:
        parent.send(None)
    os._exit(0)  # nothing here needs the time that Python takes to end


class Writer:
    """A running writer, seen from the test."""

    def __init__(self, job: EmbedJob, locks: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        self.job = job
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=writer, args=(job, locks, child))
        self.process.start()
        child.close()
        self.step = ""
        self.ended = False
        self.error: EmbedError | None = None
        self._hear()

    def _hear(self) -> None:
        assert self.pipe.poll(60), f"nothing heard after {self.step}"
        said = self.pipe.recv()
        if isinstance(said, str):
            self.step = said
        else:
            self.ended, self.error = True, said
            self.process.join()

    def go(self, steps: int | None = None) -> Writer:
        """Lets it do so many steps, or all."""
        while not self.ended and steps != 0:
            self.pipe.send(None)
            self._hear()
            steps = None if steps is None else steps - 1
        return self

    def kill(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGKILL)
        self.process.join()


@contextmanager
def writers() -> Iterator[Callable[[EmbedJob, bool], Writer]]:
    started: list[Writer] = []

    def start(job: EmbedJob, locks: bool = True) -> Writer:
        started.append(Writer(job, locks))
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            if one.process.is_alive():
                one.kill()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EmbedJob]:
    """Jobs on one text, and what each of them writes."""
    place = tmp_path_factory.mktemp("writers")
    (place / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):  # loaded by nobody
        (place / "model" / name).write_text("{}", encoding="utf-8")
    (place / "in.txt").write_text("\n".join(sentence(i) for i in range(5)), encoding="utf-8")
    job = EmbedJob(place / "model", place / "in.txt", place / "out.npy", quiet=True)
    return {
        "first": job,
        "same": job,
        "other": replace(job, pooling="cls"),
        "restart": replace(job, pooling="cls", restart=True),
    }


def at(job: EmbedJob, output: Path) -> EmbedJob:
    return replace(job, output=output)


def check_rows(job: EmbedJob) -> None:
    """The output holds the rows of ``job``, all of them."""
    rows = np.load(job.output)
    assert rows.shape == (5, 3)
    assert (np.sign(rows[:, 0]) == (-1 if job.pooling == "cls" else 1)).all()


def check_output(job: EmbedJob) -> None:
    """The output is that of ``job``, the journal says so, and nothing else is left."""
    check_rows(job)
    state = json.loads(Path(f"{job.output}.state.json").read_text())
    assert state["finished"]
    assert state["identity"]["pooling"] == (job.pooling or "mean")
    left = sorted(path.name for path in job.output.parent.iterdir())
    assert left == [job.output.name, f"{job.output.name}.state.json"]


@pytest.mark.parametrize(
    ("second", "locks"),
    [
        ("same", (True, True)), ("other", (True, True)), ("restart", (True, True)),
        ("other", (False, False)), ("restart", (False, True)),
    ],
    ids=str,
)  # fmt: skip
def test_no_interleaving_loses_a_finished_file(
    jobs: dict[str, EmbedJob], tmp_path: Path, second: str, locks: tuple[bool, bool]
) -> None:
    """The first is stopped at its k-th step, the second at its j-th, then each runs to its end.

    Who ends well finds its rows in the output, and nobody replaces them but a ``--restart``.
    """
    named = 0
    for k, j in itertools.product(FIRST_STEPS, SECOND_STEPS):
        folder = tmp_path / f"{k}-{j}"
        folder.mkdir()
        with writers() as start:
            a = start(at(jobs["first"], folder / "out.npy"), locks[0])
            b = start(at(jobs[second], folder / "out.npy"), locks[1])
            well: list[Writer] = []
            for one, steps in [(a, k), (b, j), (a, None), (b, None)]:
                if one.ended:
                    continue
                one.go(steps)
                if one.ended and one.error is None:
                    check_rows(one.job)
                    well.append(one)
        assert well, (a.error, b.error)
        assert len(well) == 1 or second == "same" or (second == "restart" and well[-1] is b)
        check_output(well[-1].job)
        for one, rival in [(a, b), (b, a)]:
            if one.error is not None:
                assert re.search("right now|begun by a different job", str(one.error))
                named += f"({rival.process.pid} on " in str(one.error)
    assert named > 5


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "nolocks"])
def test_a_kill_leaves_a_lock_that_stops_nobody(
    jobs: dict[str, EmbedJob], tmp_path: Path, locks: bool
) -> None:
    left = 0
    for k in range(1000):
        folder = tmp_path / str(k)
        folder.mkdir()
        job = at(jobs["first"], folder / "out.npy")
        with writers() as start:
            a = start(job, locks).go(k)
            if a.ended:
                break
            a.kill()
            left += Path(f"{job.output}.lock").exists()
            b = start(job, locks).go()
        assert b.error is None, a.step
        check_output(job)
    assert left > 8


def test_two_that_find_a_dead_ones_lock(jobs: dict[str, EmbedJob], tmp_path: Path) -> None:
    """Where a folder has no locks, only one of them may take it over."""
    for k in range(12):
        folder = tmp_path / str(k)
        folder.mkdir()
        job = at(jobs["first"], folder / "out.npy")
        with writers() as start:
            start(job, False).go(8).kill()
            assert Path(f"{job.output}.lock").exists()
            b = start(job, False).go(k)
            c = start(job, False).go()
            b.go()
        assert b.error is None or c.error is None
        check_output(job)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "elsewhere", "pid": 7}, "(7 on elsewhere, since 2026-01-02 03:04:05)"),
        ({"boot": "before the last"}, "delete that file"),
        (None, "another process is writing"),
    ],
)
def test_a_lock_of_which_nobody_can_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any] | None, said: str
) -> None:
    """Left by another machine where there are no locks: it is refused, with what to do."""
    monkeypatch.setattr(outputlock, "WRITE_S", 0.02)
    lock = OutputLock(tmp_path / "out.npy")
    owner = {"pid": 1 << 30, "started": "1", **outputlock._this_machine(),
             "since": "2026-01-02 03:04:05", "locked": False}  # fmt: skip
    lock.path.write_text("" if change is None else json.dumps(owner | change))
    before = lock.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(EmbedError, match="delete that file") as error:
            lock.acquire()
    assert said in str(error.value)
    assert lock.path.read_bytes() == before
    if change is not None:  # and where there are some for this machine alone
        with pytest.raises(EmbedError, match="delete that file"):
            lock.acquire()
    lock.path.write_text(json.dumps(owner))
    with lock:  # this one has certainly ended
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "nolocks"])
def test_a_lock_keeps_this_process_off_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    output = tmp_path / "out.npy"
    with OutputLock(output):
        with pytest.raises(EmbedError, match=rf"another process \({os.getpid()} on .* is writing"):
            OutputLock(output).acquire()
        OutputLock(tmp_path / "other.npy").acquire().release()
    with OutputLock(output) as lock:
        lock.require()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "out.npy").acquire()
    handle = os.dup(lock._handle or 0)  # what a forked child would hold
    lock.release()
    OutputLock(tmp_path / "out.npy").acquire().release()
    os.close(handle)


def test_where_nothing_may_be_written(
    jobs: dict[str, EmbedJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished output is found complete; anything else fails with the system's own reason."""
    monkeypatch.setattr(Embedder, "load", lambda *args, pooling, **kwargs: InstantEmbedder(pooling))
    job = at(jobs["first"], tmp_path / "out.npy")
    run_job(job)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert run_job(job).already_complete
    with pytest.raises(OSError, match=r"Read-only file system: .*out.npy.lock"):
        run_job(replace(job, restart=True))
    check_output(job)


@pytest.mark.parametrize("failing", ["flock", "names"])
def test_a_lock_that_fails_leaves_no_open_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """A folder where files without a name can be locked, and this one cannot."""
    opened: list[int] = []

    def opening(*args: Any, own: Callable[..., int] = os.open, **kwargs: Any) -> int:
        opened.append(own(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(OutputLock, "_locks_work", lambda self: True)
    monkeypatch.setattr(os, "open", opening)
    owner, name = (fcntl, "flock") if failing == "flock" else (outputlock, "_names")
    monkeypatch.setattr(owner, name, no_locks)
    with pytest.raises(OSError, match="No locks available"):
        OutputLock(tmp_path / "out.npy").acquire()
    assert len(opened) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
