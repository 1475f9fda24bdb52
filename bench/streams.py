"""What the memory-bound cases share: copies as yardsticks, and figures per byte."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gpu import floor_s
from .results import Row
from .timing import Contestant, Unavailable

#: the yardstick of bandwidth: a copy between two buffers that exist already
COPY = "copy_"
#: the same copy into memory fresh from the allocator, which every operator that returns a tensor
#: writes to: on a CPU, beyond 32 MiB, the system hands it out page by page
CLONE = "clone"
#: contestants that compute something else on purpose
YARDSTICKS = (COPY, CLONE)
RATE = ("bytes_per_s", "GB/s", 1e-9)


class Copies:
    """Copies that move ``moved`` bytes: one half is read, the other written."""

    def __init__(self, moved: int, dtype: torch.dtype, device: str) -> None:
        values = max(1, moved // 2 // dtype.itemsize)
        generator = torch.Generator().manual_seed(7)
        self.source = torch.randn(values, generator=generator).to(dtype).to(device)
        self.target = torch.empty_like(self.source)

    def _checked(self, value: Tensor) -> Tensor:
        """The copies are checked against what they copied, the only right answer they have."""
        if not torch.equal(value, self.source):
            raise Unavailable("the copy is not equal to its source")
        return value

    def copy(self) -> Contestant:
        return Contestant(COPY, lambda: self.target.copy_(self.source), self._checked)

    def clone(self) -> Contestant:
        return Contestant(CLONE, self.source.clone, self._checked)

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        return {COPY: self.copy, CLONE: self.clone}


def add_figures(rows: list[Row], moved: int, ceiling: dict[str, float] | None) -> None:
    """Bytes per second, and shares of the copies and, where it was measured, of the floor."""
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
        if ceiling is not None:
            row.figures["share_of_floor"] = floor_s(0.0, moved, ceiling) / own
