"""No operator keeps memory of a call: what leaks, however little, pins the buffers around it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from calls import CALLS
from filbert.ops.shared.operator import OPERATORS

TIMES = 2000


class _MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _mallinfo2():
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _MallInfo
    return function


def _refused():
    with pytest.raises(RuntimeError, match="approximate"):
        torch.ops.filbert.bias_gelu_(torch.ones(2, 8), None, "no form")


def _repeated(name):
    """A call of an operator on operands that are made once, or of one that refuses its text."""
    if name == REFUSED:
        return _refused
    function, floats, others = CALLS[name]()
    return lambda: function(**floats, **others)


REFUSED = "a refused text"
ON_CPU = [name for name, operator in OPERATORS.items() if "cpu" in operator.devices]


@pytest.mark.skipif(_mallinfo2() is None, reason="glibc 2.33 or later counts bytes in use")
@pytest.mark.parametrize("name", [*ON_CPU, REFUSED])
def test_a_call_leaves_nothing_in_memory(name):
    call, in_use = _repeated(name), _mallinfo2()
    with torch.inference_mode():
        for _ in range(TIMES // 4):
            call()
        before = in_use().uordblks
        for _ in range(TIMES):
            call()
        after = in_use().uordblks
    assert after - before < 8 * TIMES  # bytes; the smallest chunk of glibc has 32
