"""A GPU that is not there: what torch would tell of it, for code that only reads that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench import gpu

H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20,
    total_memory=80 << 30,
)  # fmt: skip
#: what a measurement of its ceilings could have found
CEILING = {"bytes_per_s": 3e12, "flop_per_s": 7e14}


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch tell of that GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    monkeypatch.setattr(gpu, "driver", lambda: "580.1")
