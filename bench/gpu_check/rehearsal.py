"""The bench as a GPU runs it, on the CPU: ``python -m bench.gpu_check.rehearsal run CASE ...``.

Every call that names a CUDA device gets the CPU instead, and torch tells of a GPU that is not
there. What is measured means nothing; that it is measured shows that the road a GPU takes through
the bench has no hole. What differs from a GPU is here and nowhere else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import filbert
from filbert import graphs

from .. import cli, gpu, gpu_timing
from ..cases import attn_varlen

GPU = SimpleNamespace(
    name="a CPU that passes for a GPU", major=9, minor=0, multi_processor_count=132,
    L2_cache_size=1 << 16, total_memory=80 << 30,
)  # fmt: skip


def here(value: Any) -> Any:
    """The CPU for a CUDA device, anything else as it is."""
    if isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class OnTheHost(TorchFunctionMode):
    """Moves what is meant for a CUDA device to the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.device:  # a name is no place yet
            return function(*args, **(kwargs or {}))
        return function(*map(here, args), **{k: here(v) for k, v in (kwargs or {}).items()})


class Event:
    """``torch.cuda.Event`` by the host's clock, which is right where nothing runs ahead."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        if not (self.timed and other.timed):
            raise RuntimeError("both events need enable_timing=True")
        return (other.at - self.at) * 1e3


def set_device(device: Any) -> None:
    """As strict as torch's own, which wants a number."""
    index = torch.cuda._utils._get_device_index(device)
    if index > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")


class Again:
    """A graph: replay runs the captured step once more, into the same rows."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.step, self.rows = step, step().clone()

    def replay(self) -> None:
        self.rows.copy_(self.step())


def capture(model: Any, buckets: Any, *, max_sequences: int) -> Any:
    """``filbert.capture`` without graphs: the same buffers, replayed by :class:`Again`."""
    with torch.inference_mode():
        runner = graphs.CapturedEncoder(model, buckets, max_sequences, Again)
        graphs.prove(runner)
    return runner


#: what stands in for torch's own: everything the bench asks a GPU for
STAND_INS: dict[str, Any] = {
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "set_device": set_device,
    "get_device_properties": lambda device=None: GPU,
    "get_device_capability": lambda device=None: (GPU.major, GPU.minor),
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "_sleep": lambda cycles: None,
    "Event": Event,
}


@contextmanager
def no_gpu_needed() -> Iterator[None]:
    """Inside, the device ``cuda`` is there; sizes that only a GPU could afford are small."""
    with ExitStack() as stack:
        for name, value in STAND_INS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for owner, name, value in (
            (filbert, "capture", capture),
            (gpu, "COPY_BYTES", 1 << 16), (gpu, "SIDE", 32),
            (gpu_timing, "LEAST_FLUSH", 1 << 16), (gpu_timing, "WARM_UP_S", 0.0),
            (attn_varlen, "GPU_TOKENS", 1024),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(OnTheHost())
        gpu._measured.cache_clear()
        try:
            yield
        finally:
            gpu._measured.cache_clear()


def main() -> int:
    with no_gpu_needed():
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
