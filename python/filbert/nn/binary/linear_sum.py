"""Binary linear layers that are added: BinaryBERT's split layers.

Paper: BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .linear import LinearBinary
from .row_packer import RowPacker
from .traits import OneBitLinear

__all__ = ["LinearBinarySum", "packer_of"]


class LinearBinarySum(OneBitLinear, nn.Module):
    """The sum of several :class:`LinearBinary` over one input: BinaryBERT's split layers, each of
    whose ternary weights became two binary ones.

    Args:
        terms: layers of one shape.
    """

    def __init__(self, terms: Sequence[LinearBinary]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.out_features, self.in_features = terms[0].out_features, terms[0].in_features

    @property
    def nbytes(self) -> int:
        """See :class:`LinearBinary`."""
        return sum(cast(LinearBinary, term).nbytes for term in self.terms)

    @property
    def weight_ties(self) -> int:
        """See :class:`LinearBinary`."""
        return sum(cast(LinearBinary, term).weight_ties for term in self.terms)

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        norm: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As :meth:`LinearBinary.forward`; each term takes the sum so far as its residual."""
        *first, last = self.terms
        for term in first:
            residual = term(x, residual=residual, dtype=dtype)
        return last(x, residual=residual, norm=norm, dtype=dtype)

    def config(self) -> dict[str, Any]:
        """As :meth:`LinearBinary.config`."""
        return {
            "kind": "binary_sum",
            "terms": [cast(LinearBinary, term).config() for term in self.terms],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearBinarySum:
        """As :meth:`LinearBinary.from_config`."""
        return cls([LinearBinary.from_config(term) for term in config["terms"]])


def packer_of(layer: Any) -> RowPacker:
    """How ``layer``, a binary one, packs its input (its first term, of a sum)."""
    first = layer.terms[0] if isinstance(layer, LinearBinarySum) else layer
    return cast(RowPacker, first.packer)
