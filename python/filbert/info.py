"""What this installation can run, and what one call would do: ``info()`` and ``explain()``."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from . import _load
from .ops.shared.operator import OPERATORS, Operator

__all__ = ["Explanation", "Info", "explain", "info"]


class _Lines(dict[str, Any]):
    """A dict that prints as aligned lines, with nested dicts indented."""

    def __str__(self) -> str:
        return "\n".join(self._lines(self, ""))

    @staticmethod
    def _lines(values: dict[str, Any], indent: str) -> list[str]:
        width = max((len(key) for key in values), default=0)
        lines = []
        for key, value in values.items():
            if isinstance(value, dict):
                lines += [f"{indent}{key}:", *_Lines._lines(value, indent + "  ")]
            else:
                lines.append(f"{indent}{key:<{width}}  {value}")
        return lines


class Info(_Lines):
    """Result of :func:`info`: a dict that prints as a table."""


class Explanation(_Lines):
    """Result of :func:`explain`: a dict that prints as a table."""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _dense_bf16() -> str:
    try:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return "unknown to this torch"
    if supported:
        return "oneDNN in bfloat16"
    return "no bfloat16 instructions on this CPU: bfloat16 models compute in float32"


def _cuda_built(built: dict[str, str]) -> str:
    if "cuda" not in _load.missing:
        return str(torch.ops.filbert.cuda_architectures())
    return (
        f"built with {built['cuda']}, not loaded" if built.get("cuda") else "without CUDA kernels"
    )


def _state(operator: Operator) -> str:
    """Where an operator runs, in a few words."""
    if not _load.have_ops():
        return "reference code only"
    here = {"cpu": f"cpu: {_load.isa()}"} | ({} if "cuda" in _load.missing else {"cuda": "cuda"})
    return ", ".join(here[d] for d in operator.devices if d in here) or "needs CUDA"


def info() -> Info:
    """Versions built for and found, the instruction set in use, and every operator with its state.

    Returns:
        A dict that prints as a table. Making it starts no CUDA context, imports no transformers.
    """
    built = dict(_load.C.build_info()) if _load.C is not None else {}
    versions = {
        "filbert": _version("filbert"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (built against {built.get('torch', 'nothing')})",
        "cuda": f"torch {torch.version.cuda or 'without CUDA'}, filbert {_cuda_built(built)}",
        "compiler": built.get("compiler", "none"),
        "transformers": _version("transformers"),
    }
    cpu: dict[str, Any] = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "dense bf16": _dense_bf16(),
    }
    if _load.C is not None:
        details = _load.C.isa_details()
        pairs = "bfloat16 pairs" if details["bf16_pairs"] else "bfloat16 widened to float32"
        cpu["instruction set"] = (
            f"{details['isa']} ({details['vector_bytes'] * 8}-bit vectors, {pairs})"
        )
        cpu["others that run"] = ", ".join(n for n in _load.C.isas() if n != details["isa"])
    return Info(
        versions=versions,
        cpu=cpu,
        operators={name: f"{_state(op)}  ({op.what})" for name, op in OPERATORS.items()},
        missing=dict(_load.missing) or {"nothing": ""},
    )


def explain(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Which kernel a call would run, and how it would be cut up, without running it.

    Args:
        op: an operator's name, for instance ``"attn_varlen"``.
        x: the operator's first operand.
        args: what else the operator would be called with.
        kwargs: likewise.

    Raises:
        ValueError: an unknown operator.
    """
    if op not in OPERATORS:
        raise ValueError(
            f"explain: operator; got {op!r}; need one of {', '.join(OPERATORS)}; try one of them"
        )
    if not _load.have_ops():
        return Explanation(op=op, kernel="reference code", reason=_load.missing["ops"])
    operator = OPERATORS[op]
    title = f"{op}: {operator.what}"
    reason = _load.why_no_kernels(x.device)
    if x.device.type not in operator.devices:
        reason = f"{op} has no kernel for {x.device.type}; need {' or '.join(operator.devices)}"
    elif x.is_cpu and x.dtype == torch.float16 and not operator.float16_on_cpu:
        reason = f"{op} has no float16 on the CPU; need float32 or bfloat16"
    if _load.C is None or reason is not None:
        kernel = f"none: {reason}" if reason else "cuda" if x.is_cuda else f"cpu, {_load.isa()}"
        why = "" if _load.C else "filbert._C, which knows the plans, is not loaded"
        return Explanation(op=title, kernel=kernel, reason=why)
    if x.is_cuda:
        kernel = "cuda"
        if x.ndim == 3:
            kernel += ", no tensor cores" if x.dtype == torch.float32 else ", mma.m16n8k16"
        result = Explanation(op=title, kernel=kernel, dtype=str(x.dtype))
    else:
        details = _load.C.isa_details()
        numbers = "bfloat16 pairs" if details["bf16_pairs"] else "bfloat16 widened to float32"
        result = Explanation(
            op=title,
            kernel=f"cpu, {details['isa']}, {details['vector_bytes'] * 8}-bit vectors",
            dtype=f"{x.dtype}" + (f", {numbers}" if x.dtype == torch.bfloat16 else ""),
        )
    result.update(operator.explain(x, *args, **kwargs))
    return result
