"""bias + GELU in place, measured against the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import streams
from ..ours import compiled_filbert
from ..peak import Work
from ..results import Row
from ..runner import Options
from ..sweep import sweep
from ..timing import Contestant

NAME = "bias_gelu"
ABOUT = "bias + GELU over a feed-forward layer's rows: eager PyTorch, filbert, copies"
REFERENCE = "F.gelu"
RATE = streams.RATE
#: relative error of the worst row against float64 on the same inputs
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Size:
    """``rows`` rows of ``width`` values."""

    rows: int
    width: int

    def moved(self, dtype: torch.dtype) -> int:
        """Bytes that have to move: x in, y out."""
        return 2 * self.rows * self.width * dtype.itemsize


#: the inner widths of BERT-base and MiniLM
WORKLOADS = {
    f"{rows}x{width}": Size(rows, width) for width in (3072, 1536) for rows in (64, 1024, 16384)
}


class _Inputs:
    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x, bias = (
            torch.randn(*shape, generator=generator).to(dtype).to(device)
            for shape in ((size.rows, size.width), (size.width,))
        )
        self.x, self.bias = x, bias

    def right_answer(self) -> Tensor:
        return F.gelu(self.x.double() + self.bias.double())

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        return {name: partial(build, self) for name, build in BUILDERS.items()}


def eager(given: _Inputs) -> Contestant:
    return Contestant(REFERENCE, lambda: F.gelu(given.x + given.bias), lambda value: value)


def ours(given: _Inputs) -> Contestant:
    """In place, as the encoder calls it; its input is put back, untimed, before every run.

    Fed with its own results, GELU would soon see nothing but one value near 0 in every column.
    """
    op = compiled_filbert().ops.bias_gelu_
    x = given.x.clone()
    return Contestant(
        "filbert, in place",
        lambda: op(x, given.bias),
        lambda value: value.clone(),
        before=lambda: x.copy_(given.x),
    )


BUILDERS: dict[str, Callable[[_Inputs], Contestant]] = {REFERENCE: eager, "filbert, in place": ours}


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    del who  # the same for everybody, however often it goes over memory
    return Work(moved=size.moved(dtype))


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    return sweep(
        options, WORKLOADS, _Inputs, work,
        figure=RATE[0], reference=lambda _: REFERENCE, tolerance=TOLERANCE, copies=True,
    )  # fmt: skip
