"""No operator keeps memory of a call: what leaks, however little, pins the buffers around it."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from cases import normal, offsets
from filbert import ops

CALLS = 2000


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
        torch.ops.filbert.bias_gelu_(X.clone(), None, "no form")


X, Q, CU = normal(8, 64), normal(8, 2, 32), offsets([3, 5])
NORM = (torch.ones(64), torch.zeros(64), 1e-5)
DENSE = ops.pack_dense(normal(64, 64))
WORDS, SUMS = ops.pack_bits(X)
TILES = torch.zeros(4, 2, 16, dtype=torch.int32)
TOTALS = torch.full((64,), -64, dtype=torch.int32)
CALLED = {
    "attn_binary": lambda: ops.attn_binary(WORDS[0], WORDS[0], WORDS[0], CU, 5, 2, 32),
    "attn_varlen": lambda: ops.attn_varlen(Q, Q, Q, CU, CU, 5, 5, 1 / math.sqrt(32)),
    "bias_gelu_": lambda: ops.bias_gelu_(X.clone(), X[0], "tanh"),
    "gather_rows": lambda: ops.gather_rows(X, torch.arange(8)),
    "linear_binary": lambda: ops.linear_binary(WORDS, SUMS, TILES, TOTALS, torch.ones(64)),
    "linear_binary_bits": lambda: ops.linear_binary_bits(WORDS, SUMS, TILES, TOTALS, TOTALS),
    "linear_dense": lambda: ops.linear_dense(X, DENSE, 64, X[0], "gelu", X, *NORM),
    "norm_residual": lambda: ops.norm_residual(X, X[0], X, *NORM),
    "norm_residual_": lambda: ops.norm_residual_(X.clone(), X[0], X, *NORM),
    "pack_bits": lambda: ops.pack_bits(X, X[0], "exact"),
    "pack_codes": lambda: ops.pack_codes(X, 4, -7),
    "a refused text": _refused,
}  # fmt: skip


@pytest.mark.skipif(_mallinfo2() is None, reason="glibc 2.33 or later counts bytes in use")
@pytest.mark.parametrize("name", CALLED)
def test_a_call_leaves_nothing_in_memory(name):
    call, in_use = CALLED[name], _mallinfo2()
    with torch.inference_mode():
        for _ in range(CALLS // 4):
            call()
        before = in_use().uordblks
        for _ in range(CALLS):
            call()
        after = in_use().uordblks
    assert after - before < 8 * CALLS  # bytes; the smallest chunk of glibc has 32
