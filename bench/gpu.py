"""What a GPU is, and the two ceilings that were measured on it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

#: bytes of each of the two buffers of the copy, and the side of the square matrices, at most
COPY_BYTES, SIDE = 1 << 30, 8192


def driver() -> str:
    """The version of the NVIDIA driver, or ``unknown``."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown"


def filbert_cuda() -> dict[str, Any]:
    """Whether filbert's CUDA library is loaded: for which GPUs it was built, or why it is not."""
    from filbert import _load

    reason = _load.missing.get("ops") or _load.missing.get("cuda")
    if reason:
        return {"loaded": False, "reason": reason}
    return {"loaded": True, "built_for": str(torch.ops.filbert.cuda_architectures())}


def facts(device: str) -> dict[str, Any]:
    """Name, driver and sizes of a CUDA device, ready for JSON."""
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "compute_capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "l2_bytes": about.L2_cache_size,
        "memory_bytes": about.total_memory,
    }


def _median_s(run: Callable[[], Any], runs: int) -> float:
    """Median seconds of a run between two events, after three that are not counted."""
    for _ in range(3):
        run()
    pairs = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def ceilings(device: str) -> dict[str, float]:
    """The fastest this GPU moved bytes and multiplied float16 matrices, measured once per process.

    Both on random values: on zeros a GPU draws less power and is faster than data will ever be.

    Returns:
        ``bytes_per_s`` of a copy between two buffers on the device, bytes read plus bytes written;
        ``flop_per_s`` of a square float16 matrix product, two operations per multiply-add.
    """
    return dict(_measured(str(torch.device(device))))


@lru_cache(maxsize=8)
def _measured(device: str) -> dict[str, float]:
    memory = torch.cuda.get_device_properties(device).total_memory
    found = {
        "bytes_per_s": _copied(device, min(COPY_BYTES, memory // 16)),
        "flop_per_s": _multiplied(device, SIDE if memory > 16 << 30 else SIDE // 2),
    }
    torch.cuda.empty_cache()
    return found


def _copied(device: str, size: int) -> float:
    """Bytes per second, read and written, of a copy of ``size`` bytes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _median_s(lambda: target.copy_(source), 20)


def _multiplied(device: str, side: int) -> float:
    """Operations per second of a square float16 matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.float16) for _ in range(2))
    c = torch.empty_like(a)
    return 2.0 * side**3 / _median_s(lambda: torch.matmul(a, b, out=c), 15)


def floor_s(flop: float, moved: float, ceiling: dict[str, float]) -> float:
    """Seconds that no version runs much faster than: what the slower of the two ceilings needs."""
    return max(flop / ceiling["flop_per_s"], moved / ceiling["bytes_per_s"])
