"""A linear layer of low rank: dense, two products one after the other, and both by blocks of rows.

Dense contestants multiply by the product of the factors. Sizes around the rank from which on
factors have more numbers than their weight say where they stop to pay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ours import compiled_filbert
from ..peak import Work, kind_of
from ..results import Row
from ..runner import Options, on_gpu
from ..sweep import sweep
from ..timing import Contestant

NAME = "linear_lowrank"
ABOUT = "a linear layer of low rank: dense, two products, filbert by blocks of rows"
REFERENCE = "F.linear, dense"
RATE = ("operations_per_s", "GFLOP/s", 1e-9)
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Size:
    """``rows`` rows of ``inputs`` to ``outputs`` through ``rank``."""

    rows: int
    rank: int
    inputs: int
    outputs: int


#: the output projections and query, key and value together, of BERT-base and MiniLM; a half, and
#: nearly all of the rank that has as many numbers as the weight
WORKLOADS = {
    f"{inputs}x{outputs}-r{rank}-m{rows}": Size(rows, rank, inputs, outputs)
    for inputs, outputs, ranks in (
        (768, 768, (192, 208, 336)), (768, 2304, (256, 512)), (384, 384, (96, 160)),
        (384, 1152, (144, 256)),
    )
    for rank in ranks
    for rows in (1, 32, 512, 4915)
}  # fmt: skip


class _Layer:
    """One layer in every form it is run in."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        del device  # the CPU
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

        self.ops, self.size = compiled_filbert().ops, size
        self.x = (normal(size.rows, size.inputs) * size.inputs**0.5).to(dtype)
        self.a, self.b = (
            normal(*shape).to(dtype)
            for shape in ((size.rank, size.inputs), (size.outputs, size.rank))
        )
        self.weight = (self.b.double() @ self.a.double()).to(dtype)

    def right_answer(self) -> Tensor:
        return self.x.double() @ self.a.double().T @ self.b.double().T

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        size, dense, low = self.size, self.ops.linear_dense, self.ops.linear_lowrank
        whole, a, b = map(self.ops.pack_dense, (self.weight, self.a, self.b))
        runs: dict[str, Callable[[], Tensor]] = {
            REFERENCE: lambda: F.linear(self.x, self.weight),
            "F.linear, factor pairs": lambda: F.linear(F.linear(self.x, self.a), self.b),
            "filbert, dense": lambda: dense(self.x, whole, size.outputs),
            "filbert, factor pairs": lambda: dense(dense(self.x, a, size.rank), b, size.outputs),
            "filbert": lambda: low(self.x, a, b, size.rank, size.outputs),
        }

        def contestant(name: str) -> Callable[[], Contestant]:
            return lambda: Contestant(name, runs[name], lambda y: y)

        return {name: contestant(name) for name in runs}


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    """Each multiply-add once, dense or by factors; each weight and row once."""
    numbers = size.rank * (size.inputs + size.outputs)
    if "dense" in who:
        numbers = size.inputs * size.outputs
    rows = size.rows * (size.inputs + size.outputs)
    return Work({kind_of(dtype): 2.0 * size.rows * numbers}, (numbers + rows) * dtype.itemsize)


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    if on_gpu(options.device):
        raise SystemExit("linear_lowrank: runs cuBLAS on a GPU; need --device cpu")
    return sweep(
        options, WORKLOADS, _Layer, work, figure=RATE[0], reference=lambda _: REFERENCE,
        tolerance=TOLERANCE, budget_s=1.0,
    )  # fmt: skip
