"""bias + residual + LayerNorm in one pass, measured against the bandwidth of a copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ours import compiled_filbert
from ..results import Row
from ..runner import DTYPES, Options, check_then_time, matching, say
from ..timing import Contestant, Unavailable

NAME = "norm_residual"
ABOUT = "bias + residual + LayerNorm: eager PyTorch, filbert, and copies of as many bytes"
REFERENCE = "F.layer_norm"
#: the yardstick of bandwidth: a copy between two buffers that exist already
COPY = "copy_"
#: the same copy into memory fresh from the allocator, which every operator that returns a tensor
#: writes to: beyond 32 MiB the system hands it out page by page
CLONE = "clone"
RATE = ("bytes_per_s", "GB/s", 1e-9)
EPS = 1e-12
#: relative error of the worst row against float64 on the same inputs
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


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
        # A copy reads and writes what it is given once, so half of the bytes on either side.
        values = 3 * size.rows * size.width // 2
        self.source, self.target = random(values), torch.empty(values, dtype=dtype, device=device)

    def right_answer(self) -> Tensor:
        total = self.x.double() + self.bias.double() + self.residual.double()
        width = (self.x.shape[-1],)
        return F.layer_norm(total, width, self.weight.double(), self.beta.double(), EPS)


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


def _a_copy(value: Tensor, given: _Inputs) -> Tensor:
    """The copies are checked against what they copied, the only right answer they have."""
    if not torch.equal(value, given.source):
        raise Unavailable("the copy is not equal to its source")
    return value


def copy(given: _Inputs) -> Contestant:
    def run() -> Tensor:
        return given.target.copy_(given.source)

    return Contestant(COPY, run, lambda value: _a_copy(value, given))


def clone(given: _Inputs) -> Contestant:
    return Contestant(CLONE, given.source.clone, lambda value: _a_copy(value, given))


BUILDERS: dict[str, Callable[[_Inputs], Contestant]] = {
    REFERENCE: eager,
    "filbert": ours,
    "filbert, in place": ours_in_place,
    COPY: copy,
    CLONE: clone,
}


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    rows: list[Row] = []
    for name in matching(list(WORKLOADS), options.workloads or ("*",), "--workload"):
        size = WORKLOADS[name]
        for dtype in options.dtypes:
            moved = size.moved(DTYPES[dtype])
            say(f"{name} {dtype}: {moved / 2**20:.1f} MiB move")
            given = _Inputs(size, DTYPES[dtype], options.device)
            found = check_then_time(
                {n: lambda b=b, given=given: b(given) for n, b in BUILDERS.items()},  # type: ignore[misc]
                given.right_answer(),
                workload=name,
                dtype=dtype,
                reference=REFERENCE,
                tolerance=TOLERANCE[dtype],
                options=options,
                repeats=options.repeats or 25,
                budget_s=options.budget_s or 3.0,
                min_sample_s=0.004,
                pause_s=0.0,
                exempt=frozenset({COPY, CLONE}),
            )
            _add_figures(found, moved)
            rows += found
    return rows


def _add_figures(rows: list[Row], moved: int) -> None:
    by_name = {row.contestant: row.figures.get("median_s") for row in rows}
    for row in rows:
        own = row.figures.get("median_s")
        if own is None:
            continue
        row.figures["bytes_per_s"] = moved / own
        for name, figure in ((COPY, "share_of_copy"), (CLONE, "share_of_clone")):
            theirs = by_name.get(name)
            if theirs is not None:
                row.figures[figure] = theirs / own
