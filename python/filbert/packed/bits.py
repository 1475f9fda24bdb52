"""`PackedBits`: rows of one-bit (or few-bit) numbers, as they flow between binary modules."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops.shared.words import words_to_codes

__all__ = ["PackedBits"]


@dataclass(frozen=True, eq=False)
class PackedBits:
    """Rows of numbers ``scale * (step * code + low)`` whose codes are held as planes of bits.

    It is what :class:`filbert.nn.LinearBinary` and :class:`filbert.nn.BinaryAttention` hand to each
    other. The layout is the same on every device: bit ``k % 32`` of word ``k // 32`` is element
    ``k``, low bits first, and what pads a row is 0.

    Attributes:
        words: int32 ``[P, T, ceil(features / 32)]``; plane ``p`` weighs ``2**p`` in the code.
        sums: int32 ``[T]``, the sum of each row's codes.
        features: elements in a row.
        step: 2 for ±1, 1 otherwise.
        low: the integer of code 0: -1 for ±1 and ternary, 0 for {0, 1}.
        scale: float32 ``[T]``, or None for 1.
    """

    words: Tensor
    sums: Tensor
    features: int
    step: int = 2
    low: int = -1
    scale: Tensor | None = None

    @classmethod
    def signs(cls, x: Tensor, threshold: Tensor | None = None, ties: str = "below") -> PackedBits:
        """±1 by which side of ``threshold`` the elements of ``x`` ``[T, K]`` lie on; 0 for an
        element on it with ``ties="exact"``. Arguments as :func:`filbert.ops.pack_bits`."""
        words, sums = ops.pack_bits(x, threshold, ties)
        return cls(words, sums, x.shape[1], step=1 if ties == "exact" else 2)

    @classmethod
    def bits(cls, x: Tensor, threshold: Tensor | None = None, ties: str = "below") -> PackedBits:
        """{0, 1}: whether the elements of ``x`` ``[T, K]`` lie above ``threshold``; one on it is 0
        with ``ties="below"`` and 1 with ``ties="above"``."""
        if ties == "exact":
            raise ValueError(
                "ties: got 'exact', need 'below' or 'above': {0, 1} has no third value; try signs()"
            )
        words, sums = ops.pack_bits(x, threshold, ties)
        return cls(words, sums, x.shape[1], step=1, low=0)

    @classmethod
    def codes(
        cls, x: Tensor, bits: int, low: int | None = None, scale: Tensor | None = None
    ) -> PackedBits:
        """``x`` ``[T, K]`` quantised to 2, 4 or 8 bits, see :func:`filbert.ops.pack_codes`.

        ``low`` is ``-2**(bits - 1)`` if not given; ``scale`` ``[T]`` is taken from each row's
        largest magnitude if not given."""
        low = -(2 ** (bits - 1)) if low is None else low
        words, sums, scale = ops.pack_codes(x, bits, low, scale)
        return cls(words, sums, x.shape[1], step=1, low=low, scale=scale)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, features)``"""
        return self.words.shape[1], self.features

    @property
    def planes(self) -> int:
        """Bits of a code."""
        return self.words.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of words, sums and scale."""
        parts = [self.words, self.sums] + ([] if self.scale is None else [self.scale])
        return sum(t.numel() * t.element_size() for t in parts)

    def unpack_codes(self) -> Tensor:
        """int64 ``[T, features]`` codes."""
        return words_to_codes(self.words, self.features)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[T, features]`` numbers."""
        values = (self.step * self.unpack_codes() + self.low).to(dtype)
        return values if self.scale is None else values * self.scale[:, None].to(dtype)

    def to(self, device: torch.device | str) -> PackedBits:
        """The same rows on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        return PackedBits(
            self.words.to(device), self.sums.to(device), self.features, self.step, self.low, scale
        )
