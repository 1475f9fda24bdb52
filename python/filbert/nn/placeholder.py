"""Parameters whose values are packed elsewhere: they still answer, and a write to them is noticed.

Code asks a module for ``next(module.parameters()).device``, for its dtype, its number of parameters
and its bytes. Placeholders answer all of that, and take the memory of one of them; values are NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["Placeholders", "Watch"]


class Placeholders:
    """Matrices of NaN that share the memory of the largest of them.

    They are dense and contiguous, so code that writes as many elements as a parameter has (fused
    optimizers do) stays inside. Every other write counts as one of that parameter, and
    :class:`Watch` notices it. With a stride of 0 PyTorch would refuse it with advice that does not
    help.

    Args:
        like: gives dtype and device.
        elements: of the largest matrix.
    """

    def __init__(self, like: Tensor, elements: int) -> None:
        self._like, self._elements = like, elements
        self._values: Tensor | None = None

    def of(self, shape: tuple[int, int]) -> Tensor:
        """A matrix of ``shape``."""
        if self._values is None:
            self._values = self._like.new_full((self._elements,), torch.nan)
        return self._values[: shape[0] * shape[1]].view(shape)


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
