"""A feed-forward part of low rank: dense, factor pairs one after the other, and filbert's one pass.

All contestants but the dense ones compute the same function. Dense ones multiply by what the
factors' products are, which is what the part was before it was factorized.
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

NAME = "ffn_lowrank"
ABOUT = "a feed-forward part of low rank: dense, dense in chunks, factor pairs, filbert in one pass"
REFERENCE = "F.linear, dense"
RATE = ("operations_per_s", "GFLOP/s", 1e-9)
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 5e-3}
#: rows of a chunk, as transformers' chunk_size_feed_forward
CHUNK = 64


@dataclass(frozen=True)
class Size:
    """``rows`` rows through factors of one rank; ``width`` in and out, ``inner`` between."""

    rows: int
    rank: int
    width: int = 768
    inner: int = 3072


#: BERT-base; 4915 rows are 16 texts up to 512 tokens at a mean of 0.6
ON_CPU = {
    f"r{rank}-m{rows}": Size(rows, rank)
    for rank in (96, 192, 256, 384, 512)
    for rows in (32, 512, 4915)
}
ON_GPU = {f"r{rank}-m{rows}": Size(rows, rank) for rank in (96, 256) for rows in (64, 2048, 16384)}
WORKLOADS = ON_CPU | ON_GPU


class _Part:
    """One feed-forward part in every form it is run in."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        def factor(outputs: int, inputs: int) -> Tensor:
            return (normal(outputs, inputs) * inputs**-0.5).to(dtype)

        self.ops, self.size = compiled_filbert().ops, size
        self.x = normal(size.rows, size.width).to(dtype)
        self.factors = [
            factor(size.rank, size.width), factor(size.inner, size.rank),
            factor(size.rank, size.inner), factor(size.width, size.rank),
        ]  # fmt: skip
        self.up_bias, self.down_bias = (normal(n).to(dtype) for n in (size.inner, size.width))
        a, b, c, d = (f.double() for f in self.factors)
        self.up, self.down = ((b @ a).to(dtype), (d @ c).to(dtype))

    def right_answer(self) -> Tensor:
        a, b, c, d = (f.double() for f in self.factors)
        wide = F.gelu(self.x.double() @ a.T @ b.T + self.up_bias.double())
        return wide @ c.T @ d.T + self.down_bias.double()

    def dense(self, x: Tensor) -> Tensor:
        wide = F.gelu(F.linear(x, self.up, self.up_bias))
        return F.linear(wide, self.down, self.down_bias)

    def chunked(self) -> Tensor:
        return torch.cat([self.dense(x) for x in self.x.split(CHUNK)])

    def pairs(self) -> Tensor:
        a, b, c, d = self.factors
        wide = F.gelu(F.linear(F.linear(self.x, a), b, self.up_bias))
        return F.linear(F.linear(wide, c), d, self.down_bias)

    def ours_dense(self) -> Contestant:
        up, down = self.ops.pack_dense(self.up), self.ops.pack_dense(self.down)
        size, product = self.size, self.ops.linear_dense

        def run() -> Tensor:
            wide = product(self.x, up, size.inner, self.up_bias, "gelu")
            return product(wide, down, size.width, self.down_bias)

        return Contestant("filbert, dense", run, lambda y: y)

    def ours_in_pairs(self) -> Contestant:
        a, b, c, d = map(self.ops.pack_dense, self.factors)
        size, product = self.size, self.ops.linear_dense

        def run() -> Tensor:
            wide = product(product(self.x, a, size.rank), b, size.inner, self.up_bias, "gelu")
            return product(product(wide, c, size.rank), d, size.width, self.down_bias)

        return Contestant("filbert, factor pairs", run, lambda y: y)

    def ours(self) -> Contestant:
        pack = self.ops.pad_factor if self.x.is_cuda else self.ops.pack_dense
        a, b, c, d = map(pack, self.factors)
        size = self.size

        def run() -> Tensor:
            return self.ops.ffn_lowrank(
                self.x, a, b, self.up_bias, c, d, self.down_bias, size.rank, size.inner, size.rank,
                size.width,
            )  # fmt: skip

        return Contestant("filbert", run, lambda y: y)

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        def plain(name: str, run: Callable[[], Tensor]) -> Callable[[], Contestant]:
            return lambda: Contestant(name, run, lambda y: y)

        found = {
            REFERENCE: plain(REFERENCE, lambda: self.dense(self.x)),
            "F.linear, factor pairs": plain("F.linear, factor pairs", self.pairs),
            "filbert": self.ours,
        }
        if not self.x.is_cuda:
            found |= {
                "F.linear, dense in chunks": plain("F.linear, dense in chunks", self.chunked),
                "filbert, dense": self.ours_dense,
                "filbert, factor pairs": self.ours_in_pairs,
            }
        return found


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    """Each multiply-add once, dense or by factors; each weight and row once."""
    dense = "dense" in who
    numbers = 2 * size.inner * size.width
    if not dense:
        numbers = 2 * size.rank * (size.width + size.inner)
    rows = 2 * size.rows * size.width
    return Work({kind_of(dtype): 2.0 * size.rows * numbers}, (numbers + rows) * dtype.itemsize)


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    default = list(ON_GPU if on_gpu(options.device) else ON_CPU)
    return sweep(
        options, WORKLOADS, _Part, work, figure=RATE[0], reference=lambda _: REFERENCE,
        tolerance=TOLERANCE, budget_s=4.0, default=default,
    )  # fmt: skip
