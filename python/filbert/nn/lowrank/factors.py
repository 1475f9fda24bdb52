"""A weight as two thin factors, of numbers or of few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grouped.weight import GroupedWeight

__all__ = ["Factors", "GroupedFactors"]


@dataclass(frozen=True)
class Factors:
    """``b @ a`` in the place of a weight ``[N, K]``.

    Attributes:
        a: ``[R, K]``.
        b: ``[N, R]``, in the dtype of ``a``.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        fits = self.a.ndim == self.b.ndim == 2 and self.a.shape[0] == self.b.shape[1]
        if not fits or self.a.dtype != self.b.dtype or self.a.shape[0] < 1:
            raise ValueError(
                f"factors: got {tuple(self.a.shape)} {self.a.dtype} and {tuple(self.b.shape)} "
                f"{self.b.dtype}, need [R, K] and [N, R] of one dtype"
            )

    @property
    def rank(self) -> int:
        """R"""
        return self.a.shape[0]

    @property
    def weight(self) -> Tensor:
        """``[N, K]``: the product."""
        return self.b @ self.a

    @property
    def numbers(self) -> int:
        """How many there are in both."""
        return self.a.numel() + self.b.numel()

    def to(self, device: torch.device | str) -> Factors:
        """The same on another device."""
        return Factors(self.a.to(device), self.b.to(device))

    def cut(self, rank: int) -> Factors:
        """Factors of a smaller rank: the first of ``a``'s rows and of ``b``'s columns, which are
        the best ones where they are in the order of their worth."""
        return Factors(self.a[:rank].contiguous(), self.b[:, :rank].contiguous())


@dataclass(frozen=True)
class GroupedFactors:
    """The same of few bits.

    Attributes:
        a: ``[R, K]``.
        b: ``[N, R]``.

    Raises:
        ValueError: shapes that do not go together.
    """

    a: GroupedWeight
    b: GroupedWeight

    def __post_init__(self) -> None:
        if self.a.outputs != self.b.inputs:
            raise ValueError(
                f"factors: got [{self.a.outputs}, {self.a.inputs}] and [{self.b.outputs}, "
                f"{self.b.inputs}], need [R, K] and [N, R]"
            )

    @property
    def rank(self) -> int:
        """R"""
        return self.a.outputs

    def to(self, device: torch.device | str) -> GroupedFactors:
        """The same on another device."""
        return GroupedFactors(self.a.to(device), self.b.to(device))

    @property
    def weight(self) -> Tensor:
        """``[N, K]`` float32: the product."""
        return self.b.dequantize() @ self.a.dequantize()
