"""Binary linear layers that are added: BinaryBERT's split layers.

Paper: BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .linear import LinearBinary

__all__ = ["LinearBinarySum", "linear_from_config"]


class LinearBinarySum(nn.Module):
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
    def weight_ties(self) -> int:
        """See :class:`LinearBinary`."""
        return sum(cast(LinearBinary, term).weight_ties for term in self.terms)

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As :meth:`LinearBinary.forward`; each term takes the sum so far as its residual."""
        *first, last = self.terms
        for term in first:
            residual = term(x, residual=residual, dtype=dtype)
        return last(x, residual=residual, norm=norm, dtype=dtype)

    def config(self) -> dict[str, Any]:
        """As :meth:`LinearBinary.config`."""
        return {"terms": [cast(LinearBinary, term).config() for term in self.terms]}


def linear_from_config(config: dict[str, Any]) -> LinearBinary | LinearBinarySum:
    """The module that ``config`` is of."""
    if "terms" in config:
        return LinearBinarySum([LinearBinary.from_config(term) for term in config["terms"]])
    return LinearBinary.from_config(config)
