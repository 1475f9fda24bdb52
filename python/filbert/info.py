"""What this installation can run, and what one call would do: ``info()`` and ``explain()``."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import _load
from .ops import head_dims, tile_capacity
from .reference import words_for

__all__ = ["Explanation", "Info", "explain", "info"]

#: operators and what each computes
_OPS = {
    "attn_varlen": "packed variable-length fused attention",
    "attn_tiles": "the work list of attn_varlen on a GPU",
    "norm_residual": "bias + residual + LayerNorm",
    "norm_residual_": "the same, written over its input",
    "bias_gelu_": "bias + GELU in place",
    "gather_rows": "rows by index: packing and unpacking",
    "pack_bits": "rows of numbers to rows of bits",
    "pack_codes": "rows of numbers to bit planes of 2, 4 or 8 bits",
    "linear_binary": "linear layer of ±1 weights over bits",
    "linear_binary_bits": "the same with bits out",
    "linear_dense": "linear layer of floats, with what follows it",
    "attn_binary": "attention over bits",
}


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


def _state(name: str) -> str:
    """Where an operator runs, in a few words."""
    if not _load.have_ops():
        return "reference code only"
    places = [] if name == "attn_tiles" else [f"cpu: {_load.isa()}"]
    if name != "linear_dense":  # on CUDA it is torch's own
        places += ["cuda"] if "cuda" not in _load.missing else []
    return ", ".join(places) or "needs CUDA"


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
    state = {name: _state(name) for name in _OPS}
    return Info(
        versions=versions,
        cpu=cpu,
        operators={name: f"{state[name]}  ({what})" for name, what in _OPS.items()},
        missing=dict(_load.missing) or {"nothing": ""},
    )


def _offsets(cu_seqlens: Tensor) -> list[int]:
    return [int(i) for i in cu_seqlens.tolist()]


def _explain_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any, **__: Any
) -> dict:
    assert _load.C is not None
    if q.is_cuda:
        padded = q.shape[2] + -q.shape[2] % head_dims(q.device).step
        plan = _load.C.plan_attn_varlen_cuda(
            rows_q=q.shape[0], sequences=cu_seqlens_q.shape[0] - 1, heads=q.shape[1],
            dim=padded, float32=q.dtype == torch.float32,
            self_attention=q.shape[0] == k.shape[0]
            and cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr(),
        )  # fmt: skip
        return {
            "launch": f"at most {plan['blocks']:,} blocks of {plan['threads']} threads, whatever "
            "the lengths; those past the end of the work list return at once",
            "shared memory": f"{plan['shared_bytes']:,} bytes a block",
            "columns": f"{q.shape[2]} of {plan['tile_dim']} in a tile"
            + (f", by copies of {padded}" if padded != q.shape[2] else ""),
            "memory": f"{_attn_bytes(q, k):,} bytes read and written",
        }
    threads = torch.get_num_threads()
    plan = _load.C.plan_attn_varlen(
        cu_q=_offsets(cu_seqlens_q), cu_k=_offsets(cu_seqlens_k), heads=q.shape[1], dim=q.shape[2],
        bf16=q.dtype == torch.bfloat16, threads=threads,
    )  # fmt: skip
    return {
        "tasks": f"{len(plan['tasks'])} for {threads} threads, "
        f"{plan['heads_per_task']} heads of one sequence each, largest first",
        "longest keys": plan["longest_k"],
        "scratch": f"{plan['scratch_bytes']:,} bytes for each thread",
        "work": f"{2 * plan['multiply_adds']:,} floating-point operations",
        "memory": f"{_attn_bytes(q, k):,} bytes read and written",
    }


def _attn_bytes(q: Tensor, k: Tensor) -> int:
    """q, k and v read once, the output written once."""
    return 2 * (q.shape[0] + k.shape[0]) * q.shape[1] * q.shape[2] * q.element_size()


def _explain_attn_tiles(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows_q: int, rows_k: int
) -> dict[str, Any]:
    del cu_seqlens_k, rows_k
    tiles = tile_capacity(rows_q, cu_seqlens_q.shape[0] - 1)
    return {"tiles": f"at most {tiles:,}, {32 * tiles + 16:,} bytes, by one block of 256 threads"}


def _explain_gather_rows(x: Tensor, index: Tensor) -> dict[str, Any]:
    moved = 2 * index.shape[0] * x.shape[1] * x.element_size() + 8 * index.shape[0]
    return {"memory": f"{moved:,} bytes read and written at most"}


def _explain_norm_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, *_: Any, **__: Any
) -> dict[str, Any]:
    streams = 2 + (residual is not None)
    return {"memory": f"{streams * x.numel() * x.element_size():,} bytes read and written"}


def _explain_bias_gelu_(
    x: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> dict[str, Any]:
    return {"memory": f"{2 * x.numel() * x.element_size():,} bytes read and written"}


def _explain_linear_dense(
    x: Tensor, weight: Tensor, outputs: int, *_: Any, **__: Any
) -> dict[str, Any]:
    moved = (x.numel() + x.shape[0] * outputs) * x.element_size()
    return {
        "work": f"{2 * x.numel() * outputs:,} floating-point operations",
        "memory": f"{weight.numel() * weight.element_size() + moved:,} bytes read and written",
        "weight": f"{weight.dtype}, {weight.shape[0]} panels of 16 outputs",
    }


def _explain_pack(x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
    planes = args[0] if args and isinstance(args[0], int) else kwargs.get("bits", 1)
    planes = 2 if "exact" in (*args, kwargs.get("ties")) else planes
    written = x.shape[0] * (4 * planes * words_for(x.shape[1]) + 4)
    return {"memory": f"{x.numel() * x.element_size() + written:,} bytes read and written"}


def _explain_linear_binary(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, *_: Any, **__: Any
) -> dict[str, Any]:
    planes, rows, row_words = words.shape
    outputs = totals.shape[0]
    found: dict[str, Any] = {}
    if words.is_cuda:
        assert _load.C is not None
        properties = torch.cuda.get_device_properties(words.device)
        plan = _load.C.plan_linear_binary_cuda(
            rows, outputs, row_words, planes, properties.multi_processor_count,
            10 * properties.major + properties.minor,
        )  # fmt: skip
        found["counted"] = (
            "mma.m16n8k256 AND + popcount" if plan["tensor_cores"] else "__popc, no tensor cores"
        )
        found["launch"] = (
            f"{plan['blocks']:,} blocks of {plan['threads']} threads, "
            f"{plan['tile_rows']} x {plan['tile_outputs']} a block"
        )
    else:
        found["counted"] = "by vectors' population counts or byte lookups, see docs/binary.md"
    return found | {
        "work": f"{rows * outputs * row_words * 32 * planes:,} multiply-adds of ±1",
        "weight": f"{weight.numel() * 4:,} bytes, {weight.numel() * 128:,} as float32",
        "memory": f"{4 * (words.numel() + weight.numel()):,} bytes of bits read",
    }


def _explain_attn_binary(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any
) -> dict[str, Any]:
    bits = 32 * q.shape[1]
    lengths = [b - a for a, b in pairwise(_offsets(cu_seqlens))]
    return {
        "work": f"{2 * bits * sum(n * n for n in lengths):,} multiply-adds of ±1",
        "memory": f"{4 * (q.numel() + k.numel() + 2 * v.numel()):,} bytes read and written",
    }


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
    if op not in _OPS:
        raise ValueError(
            f"explain: operator; got {op!r}; need one of {', '.join(_OPS)}; try one of them"
        )
    if not _load.have_ops():
        return Explanation(op=op, kernel="reference code", reason=_load.missing["ops"])
    reason = _load.why_no_kernels(x.device)
    if not x.is_cuda and (op == "attn_tiles" or x.dtype == torch.float16):
        reason = "the CPU kernels need no work list, and have no float16"
    if _load.C is None or reason is not None:
        kernel = f"none: {reason}" if reason else "cuda" if x.is_cuda else f"cpu, {_load.isa()}"
        why = "" if _load.C else "filbert._C, which knows the plans, is not loaded"
        return Explanation(op=f"{op}: {_OPS[op]}", kernel=kernel, reason=why)
    if x.is_cuda:
        kernel = "cuda"
        if x.ndim == 3:
            kernel += ", no tensor cores" if x.dtype == torch.float32 else ", mma.m16n8k16"
        result = Explanation(op=f"{op}: {_OPS[op]}", kernel=kernel, dtype=str(x.dtype))
    else:
        details = _load.C.isa_details()
        numbers = "bfloat16 pairs" if details["bf16_pairs"] else "bfloat16 widened to float32"
        result = Explanation(
            op=f"{op}: {_OPS[op]}",
            kernel=f"cpu, {details['isa']}, {details['vector_bytes'] * 8}-bit vectors",
            dtype=f"{x.dtype}" + (f", {numbers}" if x.dtype == torch.bfloat16 else ""),
        )
    explainers: dict[str, Callable[..., dict[str, Any]]] = {
        "attn_varlen": _explain_attn_varlen,
        "norm_residual": _explain_norm_residual,
        "norm_residual_": _explain_norm_residual,
        "bias_gelu_": _explain_bias_gelu_,
        "gather_rows": _explain_gather_rows,
        "attn_tiles": _explain_attn_tiles,
        "pack_bits": _explain_pack,
        "pack_codes": _explain_pack,
        "linear_binary": _explain_linear_binary,
        "linear_binary_bits": _explain_linear_binary,
        "linear_dense": _explain_linear_dense,
        "attn_binary": _explain_attn_binary,
    }
    result.update(explainers[op](x, *args, **kwargs))
    return result
