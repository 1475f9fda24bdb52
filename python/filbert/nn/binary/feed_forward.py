"""The feed-forward slot between binary linear layers: bits in between where they can be.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import ops
from ...packed.bits import PackedBits
from ..layer import FeedForward
from .dot_packer import DotPacker
from .linear import LinearBinary
from .linear_sum import LinearBinarySum, packer_of
from .row_packer import one_of

__all__ = ["BinaryFeedForward"]


class BinaryFeedForward(FeedForward):
    """As :class:`~filbert.nn.layer.FeedForward`. Where ``up`` is a :class:`LinearBinary` and
    ``down`` takes one bit, the activation is part of integer thresholds, and no float of the inner
    size is stored.

    Args:
        up: to the inner size.
        down: back to N.
        activation: between them, ``"gelu"`` (erf) or ``"relu"``.
    """

    kind = "binary"

    def __init__(
        self,
        up: LinearBinary | LinearBinarySum,
        down: LinearBinary | LinearBinarySum,
        activation: str = "gelu",
    ) -> None:
        super().__init__(up, down)
        one_of("activation", activation, ("gelu", "relu"))
        self.between = activation
        self.inner: DotPacker | None = None

    def derive(self) -> None:
        """Makes the integer thresholds again from the tensors that they follow from."""
        into = packer_of(self.down)
        self.inner = None
        if isinstance(self.up, LinearBinary) and into.bits == 1:
            self.inner = self.up.codes_for(into, self.between)

    def inner_of(self, rows: Tensor) -> Tensor | PackedBits:
        """What ``down`` takes: packed bits, or floats after the activation."""
        if self.inner is not None and isinstance(self.up, LinearBinary):
            return self.up.forward_bits(rows, self.inner)
        y: Tensor = self.up(rows)
        return ops.bias_gelu_(y) if self.between == "gelu" else y.relu_()

    def config(self) -> dict[str, Any]:
        """As of any feed-forward part."""
        return {**super().config(), "activation": self.between}
