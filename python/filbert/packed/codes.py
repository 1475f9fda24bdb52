"""`QuantizedRows`: rows of 8-bit codes, as they flow between modules of few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops

__all__ = ["QuantizedRows"]


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows of numbers ``scale * (codes - zero)``, each with its own scale and zero.

    Attributes:
        codes: uint8 ``[T, K]``.
        scale: float32 ``[T]``; NaN for a row that held NaN or an infinity.
        zero: int32 ``[T]``, the code of 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, x: Tensor) -> QuantizedRows:
        """Rows ``[T, K]`` of numbers by each row's own range, see
        :func:`filbert.ops.quantize_rows`."""
        return cls(*ops.quantize_rows(x))

    @property
    def shape(self) -> torch.Size:
        """``[T, K]``"""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[T, K]`` numbers."""
        return (self.scale[:, None] * (self.codes.float() - self.zero[:, None])).to(dtype)
