"""Linear layers whose weight is a product of two thin factors of few bits.

Papers: FlashSVD, arXiv 2508.01506; Q-BERT, arXiv 1909.05840.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...packed.codes import QuantizedRows
from ..grouped.linear import LinearGrouped
from .factors import GroupedFactors

__all__ = ["LinearLowRankGrouped"]


class LinearLowRankGrouped(nn.Module):
    """``activation(x @ (b @ a).T + bias)`` as :func:`filbert.linear_grouped` twice, with 8-bit
    codes between. For inference only.

    Args:
        factors: of the weight ``[N, K]``, or of several over the same inputs, one below the other.
        bias: ``[N]``, or None; kept in float32.
        activation: None, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        sizes: outputs of each weight; all are one if not given.
        compute_dtype: of the result where rows are codes; rows of numbers have their own.
        weight_dtype: of the weights that these were made of.

    Attributes:
        first, second: :class:`filbert.nn.LinearGrouped`, K to R and R to N.

    Raises:
        ValueError: shapes or an activation that do not fit.
    """

    takes_bits = False
    #: rows of 8-bit codes may be given, and be asked for
    takes_codes = True
    keeps_weight = True
    batch_invariant = True
    trainable = False
    #: what applies a LayerNorm after it
    norm_kernel = "in linear_grouped"
    reason = "weight of two thin factors of few bits, rows of 8-bit codes; sums are exact integers"

    def __init__(
        self,
        factors: GroupedFactors,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        sizes: Sequence[int] | None = None,
        compute_dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.first = LinearGrouped([factors.a], compute_dtype=compute_dtype)
        self.second = LinearGrouped(
            [factors.b], bias, activation=activation, compute_dtype=compute_dtype,
            weight_dtype=weight_dtype,
        )  # fmt: skip
        self.in_features, self.out_features = factors.a.inputs, factors.b.outputs
        self.rank, self.activation = factors.rank, activation
        self.compute_dtype, self.weight_dtype = compute_dtype, weight_dtype
        self.sizes = tuple(sizes or (self.out_features,))
        if sum(self.sizes) != self.out_features:
            raise ValueError(f"sizes: got {self.sizes}, need {self.out_features} together")

    @property
    def factors(self) -> GroupedFactors:
        """As they came."""
        return GroupedFactors(self.first.weight, self.second.weight)

    @property
    def row_blocks(self) -> int:
        """See :class:`filbert.nn.LinearGrouped`."""
        return self.first.row_blocks

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        activation = "" if self.activation is None else f" + {self.activation.partition('_')[0]}"
        return f"linear_grouped twice, {self.first.bits} bits, rank {self.rank}{activation}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of both factors, their scales included."""
        return self.first.weight_bytes + self.second.weight_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are held."""
        return self.first.nbytes + self.second.nbytes

    def forward(
        self, x: Tensor | QuantizedRows, *, residual: Tensor | None = None, norm: Any = None
    ) -> Tensor:
        """Numbers out; arguments of :meth:`filbert.nn.LinearGrouped.forward`."""
        made: Tensor = self.second(self.first.forward_codes(x), residual=residual, norm=norm)
        return made

    def forward_codes(self, x: Tensor | QuantizedRows) -> QuantizedRows:
        """Codes out, for the next layer."""
        return self.second.forward_codes(self.first.forward_codes(x))

    def dense_weights(self) -> list[Tensor]:
        """What the factors stand for, each weight with storage of its own."""
        product = self.factors.weight.to(self.weight_dtype)
        return [part.clone() for part in product.split(self.sizes)]

    def shared_weights(self) -> list[Tensor] | None:
        """None: the product is nowhere."""
        return None

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal layer with tensors yet to be loaded."""
        return {
            "kind": "lowrank_grouped", "first": self.first.config(),
            "second": self.second.config(), "sizes": list(self.sizes),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearLowRankGrouped:
        """The inverse of :meth:`config`."""
        first, second = (LinearGrouped.from_config(config[n]) for n in ("first", "second"))
        return cls(
            GroupedFactors(first.weight, second.weight), second.bias,
            activation=second.activation, sizes=config["sizes"],
            compute_dtype=second.compute_dtype, weight_dtype=second.weight_dtype,
        )  # fmt: skip
