"""One file per case. A case is a module with ``NAME``, ``ABOUT``, ``WORKLOADS`` and ``run``."""

from __future__ import annotations

from types import ModuleType

from . import attn_varlen, e2e, memory, norm_residual

CASES: dict[str, ModuleType] = {
    case.NAME: case for case in (e2e, attn_varlen, norm_residual, memory)
}
