"""One operator as Python knows it, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...refusals import register_refusal

__all__ = ["OPERATORS", "Operator", "register", "register_namespace"]


@dataclass(frozen=True)
class Operator:
    """What the module of a stem says about one of its operators.

    Attributes:
        name: as in ``torch.ops.filbert``.
        what: what it computes, in a few words.
        fake: the shape-only implementation: results of the right shape, dtype and device. It
            compares devices too: with one operand on the meta device the dispatcher runs it,
            whatever the others are on.
        reference: the meaning in eager PyTorch. It is the oracle of the tests, exact when fed with
            float64, and the last resort where the compiled library cannot be loaded. It is written
            to be read, not to be fast. None where a call means nothing without a kernel.
        explain: facts about a call, from its arguments, for :func:`filbert.explain`.
        devices: the types of device that have a kernel.
        float16_on_cpu: whether the CPU kernel takes float16 rows.
    """

    name: str
    what: str
    fake: Callable[..., Any]
    reference: Callable[..., Any] | None
    explain: Callable[..., dict[str, Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    float16_on_cpu: bool = False


#: every operator by name; the module of a stem enters its own when it is imported
OPERATORS: dict[str, Operator] = {}


def register(*operators: Operator) -> None:
    """Enters ``operators`` into the table."""
    OPERATORS.update((operator.name, operator) for operator in operators)


def register_namespace(namespace: str) -> None:
    """Gives the operators of a loaded library what Python holds of them: the fakes, and the refusal
    of gradients."""
    for name, operator in OPERATORS.items():
        torch.library.register_fake(f"{namespace}::{name}", operator.fake)
    register_refusal(namespace, OPERATORS)
