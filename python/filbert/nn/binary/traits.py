"""What every linear layer of bits answers where a layer's slots are asked."""

from __future__ import annotations

from torch import Tensor

from ... import _load

__all__ = ["OneBitLinear"]


class OneBitLinear:
    """The answers; see :mod:`filbert.nn.layer`."""

    takes_bits = True
    takes_codes = False
    keeps_weight = False
    row_blocks = 0
    #: a row's bits depend on that row alone
    batch_invariant = True
    reason = "weights of one bit, counted and not multiplied"
    #: what applies a LayerNorm after it
    norm_kernel = "linear_binary"

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        return f"linear_binary {_load.isa()}"

    def dense_weights(self) -> list[Tensor] | None:
        """None: the weights that the bits came from are gone."""
        return None

    def shared_weights(self) -> list[Tensor] | None:
        """None, likewise."""
        return None
