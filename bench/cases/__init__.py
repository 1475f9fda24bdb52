"""One file per case: a module with ``NAME``, ``ABOUT``, ``WORKLOADS``, ``RATE`` and ``run``.

``RATE`` is what a row has beside its times: the figure's name, its unit, the factor to that unit.
"""

from __future__ import annotations

from types import ModuleType

from ..results import Report
from . import (
    attn_varlen,
    bias_gelu,
    e2e,
    e2e_binary,
    gather_rows,
    linear_binary,
    linear_dense,
    memory,
    norm_residual,
)

_ALL = (
    e2e, attn_varlen, norm_residual, bias_gelu, gather_rows, memory, linear_dense, linear_binary,
    e2e_binary,
)  # fmt: skip
CASES: dict[str, ModuleType] = {case.NAME: case for case in _ALL}


def rate(report: Report) -> tuple[str, str, float]:
    """The rate of the report's case, in the unit that fits the device."""
    case = CASES[report.case]
    on_gpu = str(report.environment.get("device", "")).startswith("cuda")
    return getattr(case, "RATE_ON_GPU", case.RATE) if on_gpu else case.RATE
