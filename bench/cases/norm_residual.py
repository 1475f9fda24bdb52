"""bias + residual + LayerNorm in one pass, measured against the bandwidth of a copy."""

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

NAME = "norm_residual"
ABOUT = "bias + residual + LayerNorm: eager PyTorch, filbert, and copies of as many bytes"
REFERENCE = "F.layer_norm"
RATE = streams.RATE
EPS = 1e-12
#: relative error of the worst row against float64 on the same inputs
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Size:
    """``rows`` rows of ``width`` values."""

    rows: int
    width: int

    def moved(self, dtype: torch.dtype) -> int:
        """Bytes that have to move: x and residual in, y out."""
        return 3 * self.rows * self.width * dtype.itemsize


#: rows: 64 stay in a 512 KiB L2, 1024 leave it, 16384 leave any L3 of up to 64 MiB
WORKLOADS = {
    f"{rows}x{width}": Size(rows, width) for width in (768, 384) for rows in (64, 1024, 16384)
}


class _Inputs:
    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(device)

        self.x, self.residual = random(size.rows, size.width), random(size.rows, size.width)
        self.bias, self.weight, self.beta = (random(size.width) for _ in range(3))

    def right_answer(self) -> Tensor:
        total = self.x.double() + self.bias.double() + self.residual.double()
        width = (self.x.shape[-1],)
        return F.layer_norm(total, width, self.weight.double(), self.beta.double(), EPS)

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        return {name: partial(build, self) for name, build in BUILDERS.items()}


def eager(given: _Inputs) -> Contestant:
    width = (given.x.shape[-1],)

    def run() -> Tensor:
        total = given.x + given.bias + given.residual
        return F.layer_norm(total, width, given.weight, given.beta, EPS)

    return Contestant(REFERENCE, run, lambda value: value)


def ours(given: _Inputs) -> Contestant:
    op = compiled_filbert().ops.norm_residual
    return Contestant(
        "filbert",
        lambda: op(given.x, given.bias, given.residual, given.weight, given.beta, EPS),
        lambda value: value,
    )


def ours_in_place(given: _Inputs) -> Contestant:
    """The form the encoder calls: over its own input, so no fresh memory is touched."""
    op = compiled_filbert().ops.norm_residual_
    x = given.x.clone()

    def run() -> Tensor:
        # Its output is a sound input again: rows of unit variance, whatever they were before.
        return op(x, given.bias, given.residual, given.weight, given.beta, EPS)

    return Contestant("filbert, in place", run, lambda value: value.clone())


BUILDERS: dict[str, Callable[[_Inputs], Contestant]] = {
    REFERENCE: eager,
    "filbert": ours,
    "filbert, in place": ours_in_place,
}


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    del who  # the same for everybody, however often it goes over memory
    return Work(moved=size.moved(dtype))


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    return sweep(
        options, WORKLOADS, _Inputs, work,
        figure=RATE[0], reference=lambda _: REFERENCE, tolerance=TOLERANCE, copies=True,
    )  # fmt: skip
