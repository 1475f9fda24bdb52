"""One file per case, found by its place: a module with ``NAME``, ``ABOUT``, ``WORKLOADS``, ``RATE``
and ``run``.

``RATE`` is what a row has beside its times: the figure's name, its unit, the factor to that unit.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ..results import Report

#: every case by name
CASES: dict[str, ModuleType] = {}
for _found in pkgutil.iter_modules(__path__):
    _case = importlib.import_module(f"{__name__}.{_found.name}")
    CASES[_case.NAME] = _case


def rate(report: Report) -> tuple[str, str, float]:
    """The rate of the report's case, in the unit that fits the device."""
    case = CASES[report.case]
    on_gpu = str(report.environment.get("device", "")).startswith("cuda")
    return getattr(case, "RATE_ON_GPU", case.RATE) if on_gpu else case.RATE
