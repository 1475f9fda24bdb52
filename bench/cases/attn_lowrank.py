"""Attention over latents: dense query, key and value, factors that write them, and filbert, which
rebuilds them head by head.

All contestants get the latents or, where they are dense, the rows that latents are made of. So the
factors' product with the rows is in the dense contestant's time alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ours import compiled_filbert
from ..peak import Work, kind_of
from ..results import Row
from ..runner import Options, on_gpu
from ..sweep import sweep
from ..timing import Contestant
from ..workloads import uniform_lengths

NAME = "attn_lowrank"
ABOUT = "attention over latents of low rank: dense, factors and attention apart, filbert"
REFERENCE = "filbert, dense"
RATE = ("operations_per_s", "GFLOP/s", 1e-9)
TOLERANCE = {"float32": 1e-5, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Size:
    """``batch`` texts up to ``maximum`` tokens, latents of ``rank`` that all heads share."""

    batch: int
    maximum: int
    rank: int
    heads: int
    dim: int

    @property
    def lengths(self) -> list[int]:
        """Of the texts."""
        if self.batch == 1:
            return [self.maximum]
        return uniform_lengths(self.batch, self.maximum)


WORKLOADS = {
    f"{name}-r{rank}-b{batch}-max{maximum}": Size(batch, maximum, rank, heads, dim)
    for name, rank, heads, dim in (("bert-base", 256, 12, 64), ("minilm", 144, 12, 32))
    for batch, maximum in ((1, 32), (16, 128), (16, 512), (2, 2048))
}


class _Attention:
    """One attention in every form it is run in."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        del device  # the CPU
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.ops, self.size = compiled_filbert().ops, size
        self.width = size.heads * size.dim
        rows = sum(size.lengths)
        self.cu = torch.tensor([0, *size.lengths]).cumsum(0).to(torch.int32)
        self.x = normal(rows, self.width).to(dtype)
        self.a = (normal(size.rank, self.width) * self.width**-0.5).to(dtype)
        self.b = (normal(3 * self.width, size.rank) * size.rank**-0.5).to(dtype)
        self.bias = normal(3 * self.width).to(dtype)
        self.latent = self.ops.linear_dense(self.x, self.ops.pack_dense(self.a), size.rank)

    def right_answer(self) -> Tensor:
        made = self.latent.double() @ self.b.double().T + self.bias.double()
        size, outs = self.size, []
        for own in made.split(size.lengths):
            q, k, v = own.view(-1, 3, size.heads, size.dim).permute(1, 2, 0, 3)
            weights = torch.softmax(q @ k.mT * size.dim**-0.5, -1)
            outs.append((weights @ v).transpose(0, 1).flatten(1))
        return torch.cat(outs)

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        size, ops, longest = self.size, self.ops, max(self.size.lengths)
        dense, b = (
            ops.pack_dense(w) for w in ((self.b.float() @ self.a.float()).to(self.b), self.b)
        )
        sides = [ops.pack_heads(part, size.heads) for part in self.b.chunk(3)]
        scale = size.dim**-0.5

        def attend(made: Tensor) -> Tensor:
            q, k, v = made.view(-1, 3, size.heads, size.dim).unbind(1)
            return ops.attn_varlen(q, k, v, self.cu, self.cu, longest, longest, scale)[0].flatten(1)

        runs: dict[str, Callable[[], Tensor]] = {
            REFERENCE: lambda: attend(ops.linear_dense(self.x, dense, 3 * self.width, self.bias)),
            "filbert, factors, then attention": lambda: attend(
                ops.linear_dense(self.latent, b, 3 * self.width, self.bias)
            ),
            "filbert": lambda: ops.attn_lowrank(
                self.latent, *sides, self.cu, longest, size.dim, [size.rank] * 3, scale,
                bias=self.bias,
            ).flatten(1),
        }  # fmt: skip

        def contestant(name: str) -> Callable[[], Contestant]:
            return lambda: Contestant(name, runs[name], lambda y: y)

        return {name: contestant(name) for name in runs}


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    """Products, and both of attention; latents and factors read, results written."""
    width, rows = size.heads * size.dim, sum(size.lengths)
    inner = width if who == REFERENCE else size.rank
    attended = 4.0 * width * sum(n * n for n in size.lengths)
    numbers = 3 * width * inner + rows * (inner + width)
    return Work({kind_of(dtype): 6.0 * rows * width * inner + attended}, numbers * dtype.itemsize)


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    if on_gpu(options.device):
        raise SystemExit("attn_lowrank: its kernel for GPUs is yet to come; need --device cpu")
    return sweep(
        options, WORKLOADS, _Attention, work, figure=RATE[0], reference=lambda _: REFERENCE,
        tolerance=TOLERANCE, budget_s=4.0,
    )  # fmt: skip
