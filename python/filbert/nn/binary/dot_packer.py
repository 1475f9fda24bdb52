"""How the integers of a binary product become the bits of the next layer, without ever being
floats: by integer thresholds that stand for all the float arithmetic in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...packed.bits import PackedBits
from .row_packer import RowPacker
from .thresholds import ALWAYS, first_where, integer_threshold_of, narrowed

__all__ = ["DotPacker"]

#: where GELU turns from falling to rising
_GELU_TURN = -0.7517915
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
}


class DotPacker(nn.Module):
    """Integer thresholds that give the bits of ``packer(activation(value(dot)))``.

    ``value`` is what the layer makes of a dot product, ``alpha * dot + bias`` in float32. It never
    falls, so with no activation or ReLU each bit is one comparison. GELU falls and then rises: a
    condition on it holds from some integer on, and perhaps below another. It has the sign of its
    argument, so before a plain sign (BiBERT) it drops out, with one exception: below about -5.54
    float32 GELU is -0.0, whose ``torch.sign`` is 0. With ``ties="exact"`` that is kept; otherwise
    such an element is negative, as its argument is.

    Attributes:
        above, above_until: int32 ``[N]``: the (upper) bit is 1 from ``above`` on, and below
            ``above_until``, if that is not None.
        at, at_until: the same of the lower bit of ternary codes. ``at`` is None where it is
            ``above`` in every channel.
        step, low: of the codes, see :class:`filbert.PackedBits`.
        ternary: whether there are two planes, because some channel can be 0.
        all_tie: whether the zero of every channel is one integer, the one before ``above``.
    """

    above: Tensor
    above_until: Tensor | None
    at: Tensor | None
    at_until: Tensor | None

    def __init__(
        self,
        value: Callable[[Tensor], Tensor],
        reach: int,
        packer: RowPacker,
        activation: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            value: int64 ``[N]``, an integer for each channel, to float32 ``[N]``; never falls.
            reach: no integer has a larger magnitude.
            packer: of the layer that takes the bits; one bit, N features.
            activation: ``None``, ``"relu"`` or ``"gelu"`` (erf), between ``value`` and ``packer``.
            device: where the thresholds go.
        """
        super().__init__()
        self.features = packer.features
        edges: dict[str, tuple[Tensor | None, Tensor | None]] = {
            name: self._edges(value, reach, holds, packer, activation, device)
            for name, holds in packer.conditions().items()
        }
        above, at = edges["above"], edges.get("at", edges["above"])
        same_start, same_until = (_same(a, b) for a, b in zip(above, at, strict=True))
        self.ternary = not (same_start and same_until)
        if "at" in edges:
            edges["at"] = (None if same_start else at[0], at[1] if self.ternary else None)
        self.low = packer.low
        self.step = 2 if packer.signed and not self.ternary else 1
        for name in ("above", "at"):
            start, until = edges.get(name, (None, None))
            # Derived from what a checkpoint holds, so they are not part of it.
            self.register_buffer(name, start, persistent=False)
            self.register_buffer(f"{name}_until", until, persistent=False)
        # Asked once, since on a GPU it waits.
        plain = self.above_until is None and self.at_until is None
        self.all_tie = plain and self.at is not None and torch.equal(self.above, self.at + 1)

    @staticmethod
    def _edges(
        value: Callable[[Tensor], Tensor],
        reach: int,
        holds: Callable[[Tensor], Tensor],
        packer: RowPacker,
        activation: str | None,
        device: torch.device | None,
    ) -> tuple[Tensor, Tensor | None]:
        size, act = packer.features, ACTIVATIONS[activation]

        def bit(dot: Tensor) -> Tensor:
            return holds(act(value(dot)))

        if activation != "gelu":
            return integer_threshold_of(bit, size, -reach, reach, device), None
        low = torch.full((size,), -reach, dtype=torch.int64, device=device)
        turn = first_where(lambda dot: value(dot) > _GELU_TURN, low, -low)
        start = first_where(bit, turn, -low)
        until = first_where(lambda dot: ~bit(dot), low, turn - 1)
        if packer.ties != "exact":  # GELU's -0.0 counts as what it is the GELU of
            t = packer.threshold
            until = low if t is None else torch.where(t == 0, low, until)
        everywhere = until >= start
        start = narrowed(torch.where(everywhere, low, start), -reach, reach)
        until = torch.where(everywhere | (until <= low), ALWAYS, until).to(torch.int32)
        return start, until if bool((until != ALWAYS).any()) else None

    def forward(self, make: Callable[..., tuple[Tensor, Tensor]]) -> PackedBits:
        """Makes the codes.

        Args:
            make: takes ``above``, ``until``, ``lower`` and ``lower_until``, as
                :func:`filbert.linear_binary_bits` does, and gives words and sums as it does.
        """
        words, sums = make(self.above, self.above_until, self.at, self.at_until)
        return PackedBits(words, sums, self.features, self.step, self.low)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
