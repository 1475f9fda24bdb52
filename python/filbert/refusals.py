"""What every kernel and packed model refuses: to lose a gradient, and to be recorded.

A missing gradient trains nothing and says nothing. So the operators get an Autograd kernel that
raises where a gradient is wanted and otherwise hands the call on to the device's kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "below_autograd",
    "has_tangent",
    "refuse_gradient",
    "refuse_recording",
    "register_refusal",
]


def refuse_gradient(op: str, operands: Iterable[tuple[str, Any]]) -> None:
    """Raises if a gradient of one of the ``operands`` (name and value; what is no tensor is passed
    over) would be recorded.

    Raises:
        RuntimeError: gradients are recorded and a tensor requires one, or it has a tangent of
            forward-mode differentiation.
    """
    for name, value in operands:
        if not isinstance(value, Tensor):
            continue
        if (value.requires_grad and torch.is_grad_enabled()) or has_tangent(value):
            raise RuntimeError(
                f"{op} is inference only: {name} requires a gradient, and the kernel has none to "
                "give; try 'with torch.inference_mode():' (or torch.no_grad()) around the call, or "
                f"{name}.detach()"
            )


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows ``x``."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _refusing(op: Any, written: list[int]) -> Callable[..., Any]:
    """The Autograd kernel of ``op``, an ``OpOverload``. ``written`` are the places of the arguments
    that it writes."""
    what = op._schema.name.partition("::")[2]
    names = [argument.name for argument in op._schema.arguments]
    any_requires_grad, below = torch._C._any_requires_grad, torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset: Any, *args: Any) -> Any:
        wanted = torch.is_grad_enabled() and any_requires_grad(*args)
        if wanted or forward_ad._current_level >= 0:
            refuse_gradient(what, zip(names, args, strict=False))
        for i in written:  # who saved it for a backward pass has to notice
            torch.autograd.graph.increment_version(args[i])
        return op.redispatch(keyset & below, *args)

    return kernel


def _counting(op: Any, written: list[int]) -> Callable[..., Any]:
    """The ADInplaceOrView kernel of ``op``. It is what inference mode leaves of the other one, for
    tensors that were made outside of it."""
    below = torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset: Any, *args: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        return op.redispatch(keyset & below, *args)

    return kernel


#: what is registered lives as long as the objects that registered it
_libraries: list[torch.library.Library] = []


def register_refusal(namespace: str, names: Iterable[str]) -> None:
    """Gives the operators ``names`` of ``namespace`` the kernel that refuses gradients."""
    library = torch.library.Library(namespace, "IMPL")
    for name in names:
        op = getattr(getattr(torch.ops, namespace), name).default
        written = [
            i for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write
        ]
        library.impl(name, _refusing(op, written), "Autograd", with_keyset=True)
        if written:
            library.impl(name, _counting(op, written), "ADInplaceOrView", with_keyset=True)
    _libraries.append(library)


def below_autograd() -> AbstractContextManager[Any]:
    """Calls go straight to the kernels, without a stop where gradients would be recorded: for code
    that has refused them already, and saves as much as the kernel of a short text costs."""
    if torch.compiler.is_compiling():
        return nullcontext()
    guard: AbstractContextManager[Any] = torch._C._AutoDispatchBelowADInplaceOrView()
    return guard


def is_exporting() -> bool:
    """Whether ``torch.export`` is at work, before it calls anything too."""
    if torch.compiler.is_exporting():
        return True
    # It looks a model's parameters up by name before it says so in public.
    trace = sys.modules.get("torch.export._trace")
    return getattr(trace, "_EXPORT_FLAGS", None) is not None


def refuse_recording(who: str, x: Tensor | None, advice: str) -> None:
    """Raises if the call is being recorded, to be replayed later on other inputs.

    Raises:
        NotImplementedError: under ``torch.jit.trace``, ``torch.export`` and ONNX export, or where
            ``x`` is a stand-in without values.
    """
    if torch.jit.is_tracing():
        how = "torch.jit.trace"
    elif is_exporting():
        how = "torch.export (or ONNX export)"
    elif type(x).__name__ in ("FakeTensor", "FunctionalTensor"):
        how = f"tracing with a {type(x).__name__}"
    else:
        return
    raise NotImplementedError(
        f"{who} cannot be recorded by {how}: how many rows there are depends on the values of the "
        f"mask, and a recording would keep the number of its example; try {advice}"
    )
