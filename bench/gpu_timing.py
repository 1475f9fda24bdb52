"""How kernels are timed on a GPU: by events on its own stream, every run with a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

#: bytes written, and as many read, before every run, where twice the L2 is less
LEAST_FLUSH = 128 << 20
#: clock cycles that the device then waits, about 0.4 ms: a host launches an operator in 5 to 50
#: microseconds, on an H200 often later than the flush had ended
HEAD_START = 700_000
#: a GPU that idled starts at a low clock; this long it is kept busy before a race
WARM_UP_S = 0.1


class Event(Protocol):
    """The part of ``torch.cuda.Event`` that is used."""

    def record(self) -> None: ...

    def elapsed_time(self, other: Any) -> float: ...


class ColdCache:
    """Fills the L2 with what no contestant reads.

    One buffer is written and then another read: after the write alone the cache would be full of
    lines not yet in memory, and the run that is timed would have to wait for them to be stored.
    Then the device waits, so that the host has launched the run before the device begins it.
    """

    def __init__(self, device: str) -> None:
        self._waits = torch.device(device).type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        values = max(2 * cache, LEAST_FLUSH) // 4
        self._written = torch.empty(values, dtype=torch.float32, device=device)
        self._read = torch.zeros(values, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def __call__(self) -> None:
        self._written.fill_(1.0)
        torch.sum(self._read, dim=0, out=self._sum)
        if self._waits:
            torch.cuda._sleep(HEAD_START)


class EventClock:
    """Times what the GPU does between two events, which is what a kernel costs inside a model.

    The host runs ahead: while the cache is flushed and the device waits it launches the run and the
    second event, so launching is not timed unless it takes longer than that. What the host does
    slowly, such as one launch for each of many sequences, still shows.

    Args:
        flush: queues the work that empties the caches, see :class:`ColdCache`.
        event: makes an event with timing.
        synchronize: waits until the device has done everything.
    """

    def __init__(
        self,
        flush: Callable[[], None],
        event: Callable[[], Event],
        synchronize: Callable[[], None],
    ) -> None:
        self._flush, self._event, self._synchronize = flush, event, synchronize

    @classmethod
    def of(cls, device: str) -> EventClock:
        """The clock of a CUDA device, which should be the current one."""
        return cls(
            ColdCache(device),
            lambda: torch.cuda.Event(enable_timing=True),
            lambda: torch.cuda.synchronize(device),
        )

    def prepare(self) -> None:
        """Keeps the device busy until its clock is up."""
        start = time.perf_counter()
        while time.perf_counter() - start < WARM_UP_S:
            self._flush()
            self._synchronize()

    def time(
        self, run: Callable[[], Any], repeats: int = 1, before: Callable[[], Any] | None = None
    ) -> tuple[Any, float]:
        """The value of the last run and the mean seconds of one, as ``bench.timing.Clock`` says."""
        pairs, value = [], None
        for _ in range(repeats):
            value = None  # its memory is the next run's
            if before:
                before()
            self._flush()
            start, end = self._event(), self._event()
            start.record()
            value = run()
            end.record()
            pairs.append((start, end))
        self._synchronize()
        milliseconds = sum(start.elapsed_time(end) for start, end in pairs)
        return value, milliseconds / 1e3 / repeats
