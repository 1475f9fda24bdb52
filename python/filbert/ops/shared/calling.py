"""What every operator does before its kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _load
from ...refusals import refuse_gradient


def kernels() -> Any:
    """The operators' namespace."""
    return torch.ops.filbert


def one_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raises unless every operand is where ``first`` is."""
    device = first.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise RuntimeError(
                f"{op}: device of {name}; got {t.device}; need {device}, as the first operand; "
                f"try {name}.to({str(device)!r})"
            )
    if not _load.have_ops():  # no Autograd kernel either
        refuse_gradient(op, [("the first operand", first), *others.items()])


def compiled(op: str, first: Tensor) -> bool:
    """Whether the kernels run the call; otherwise the caller compares devices and runs the
    reference."""
    if "ops" in _load.missing:
        _load.warn_once(f"filbert runs its slow reference code: {_load.missing['ops']}")
        return False
    if not first.is_cpu and (why := _load.why_no_kernels(first.device)) is not None:
        raise RuntimeError(f"{op}: device; got {first.device}; {why}; try tensor.cpu()")
    return True
