"""What a number depends on besides the code: processor, versions, commit, weather.

No host name, user name or folder is recorded: results are published.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import gpu

#: the instruction sets that decide which kernels run
FLAGS = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_int8",
    "amx_bf16", "avx_ne_convert",
)  # fmt: skip
PACKAGES = (
    "torch", "transformers", "onnxruntime", "onnx", "openvino", "nncf", "filbert", "numpy",
    "matplotlib", "triton", "flash-attn",
)  # fmt: skip
ROOT = Path(__file__).parents[1]
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu() -> dict[str, Any]:
    """Model, relevant flags, cores and cache sizes of the processor."""
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    caches = {}
    for index in range(5):
        base = f"/sys/devices/system/cpu/cpu0/cache/index{index}"
        level, kind = _read(f"{base}/level").strip(), _read(f"{base}/type").strip()
        if level and kind != "Instruction":
            caches[f"L{level}"] = _read(f"{base}/size").strip()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "family": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "architecture": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": usable,
        "caches": caches,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
    }


def versions() -> dict[str, str]:
    """Installed versions, by package; ``missing`` where there is none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found["torch"] = torch.__version__
    return found


def commit() -> dict[str, Any]:
    """The commit of the working tree, and whether files differ from it.

    A copy of the tree that is no repository takes the commit from ``FILBERT_COMMIT``.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    given = os.environ.get("FILBERT_COMMIT", "").strip()
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") or given or "unknown",
        "dirty": None if status is None else bool(status),
    }


def filbert_build() -> dict[str, Any]:
    """What filbert says about itself: compiled or not, and the instruction set it chose."""
    try:
        from filbert import _load
    except Exception as error:  # a broken install must not take the baselines down with it
        return {"compiled": False, "reason": f"{type(error).__name__}: {error}"}
    if not _load.have_ops():
        return {"compiled": False, "reason": _load.missing.get("ops", "")}
    return {"compiled": True, "cpu_isa": _load.isa()}


@dataclass(frozen=True)
class Ticks:
    """Processor time since boot, in clock ticks."""

    total: int
    idle: int
    #: taken by other virtual machines
    stolen: int
    #: used by this process and the children it has waited for
    own: float

    @classmethod
    def now(cls) -> Ticks:
        parts = [int(part) for part in _read("/proc/stat").partition("\n")[0].split()[1:9]]
        if len(parts) < 8:
            return cls(0, 0, 0, 0.0)
        used = os.times()
        own = (used.user + used.system + used.children_user + used.children_system) * _TICKS
        return cls(sum(parts), parts[3] + parts[4], parts[7], own)


def weather(before: Ticks, after: Ticks) -> dict[str, float]:
    """Which shares of all cores' time other machines and other processes took in between."""
    total = after.total - before.total
    if total <= 0:
        return {}
    stolen = after.stolen - before.stolen
    others = total - (after.idle - before.idle) - stolen - (after.own - before.own)
    return {
        "cpu_share_of_other_machines": round(stolen / total, 3),
        "cpu_share_of_other_processes": round(max(0.0, others / total), 3),
    }


def wait_for_quiet(longest_s: float, busy: float = 0.1, window_s: float = 0.25) -> None:
    """Sleeps until other processes leave the cores alone, or until ``longest_s`` are over.

    OpenMP's barriers spin: a thread that is not scheduled holds up all the others for a whole time
    slice, so that one compiler in the background slows a small operator down a hundredfold.
    """
    deadline = time.monotonic() + longest_s
    while time.monotonic() < deadline:
        before = Ticks.now()
        time.sleep(window_s)
        seen = weather(before, Ticks.now())
        if seen.get("cpu_share_of_other_processes", 0.0) <= busy:
            return


def environment(device: str, threads: int) -> dict[str, Any]:
    """Everything above, ready for JSON."""
    from .results import without_paths

    about: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "os": f"{platform.system()} {platform.release()}",
        "device": device,
        "cpu": cpu(),
        "threads": threads,
        "versions": versions(),
        **commit(),
        "filbert": filbert_build(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if "reason" in about["filbert"]:
        about["filbert"]["reason"] = without_paths(about["filbert"]["reason"])
    if device.startswith("cuda"):
        about["gpu"] = gpu.facts(device)
        if about["filbert"]["compiled"]:
            cuda = about["filbert"]["cuda"] = gpu.filbert_cuda()
            if "reason" in cuda:
                cuda["reason"] = without_paths(cuda["reason"])
    return about


def caption(about: dict[str, Any]) -> str:
    """One line for tables and plots: hardware, threads, versions, commit."""
    chip, made = about["cpu"], about["versions"]
    best = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    isa = next((flag for flag in best if flag in chip["flags"]), "")
    where = f"{chip['model']} ({chip['architecture']}, {isa or 'no AVX2'})"
    if "gpu" in about:
        where = f"{about['gpu']['name']} (driver {about['gpu']['driver']})"
    dirty = "+dirty" if about["dirty"] else ""
    return (
        f"{where}, {about['threads']} threads, torch {made['torch']}, "
        f"filbert {about['commit']}{dirty}, {about['date'][:10]}"
    )
