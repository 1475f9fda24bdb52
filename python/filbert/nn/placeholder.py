"""Parameters whose values are packed elsewhere: they still answer, and a write to them is noticed.

Code asks a module for ``next(module.parameters()).device``, for its dtype, its number of parameters
and its bytes. A placeholder answers all of that and takes no memory; its values are NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Watch", "placeholder"]


def placeholder(like: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix of ``shape``, in the dtype and on the device of ``like``, that takes no memory of
    its size: element ``(i, j)`` is element ``i + j`` of a vector of NaN.

    Not a stride of 0: PyTorch refuses to write there with advice that does not help. A write here
    succeeds, counts as a change of the parameter, and :class:`Watch` says what to do.
    """
    return like.new_full((max(sum(shape) - 1, 0),), torch.nan).as_strided(shape, (1, 1))


def _counts_writes(parameter: nn.Parameter) -> bool:
    try:
        return parameter._version >= 0
    except RuntimeError:  # made in inference mode, or of a tensor that was
        return False


class Watch:
    """Notices that parameters were written in place since it was made.

    PyTorch counts the writes to a tensor, those through a tensor of its ``state_dict`` too. Writes
    through ``.data`` are not counted, and neither are those to parameters that were made in
    inference mode.

    Args:
        named: the parameters and what each is called.
        before: names of those that were written earlier already.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], before: Iterable[str] = ()
    ) -> None:
        self.before = list(before)
        counted = [(name, p) for name, p in named if _counts_writes(p)]
        self._names = [name for name, _ in counted]
        self._parameters = [p for _, p in counted]
        self._versions = self._count()

    def _count(self) -> list[int]:
        return [p._version for p in self._parameters]

    def written(self) -> list[str]:
        """The names of the parameters that were written."""
        now = self._count()
        if now == self._versions:
            return self.before
        counts = zip(self._names, self._versions, now, strict=True)
        return self.before + [name for name, before, after in counts if before != after]
