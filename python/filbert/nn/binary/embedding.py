"""A word embedding whose rows are ±1 times a scale.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.shared.words import bits_to_words, words_for
from .weight import weight_signs

__all__ = ["BinaryEmbedding"]


def check_ids(name: str, ids: Tensor) -> None:
    """Raises a ValueError unless ``ids`` are integers that index; bytes and booleans are masks."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: got {ids.dtype}, need int64 or int32 indices; try {name}.long(), if these "
            "are indices and no mask"
        )


class BinaryEmbedding(nn.Module):
    """A table of bits; rows are expanded when they are asked for.

    Attributes:
        weight: int32 ``[V, ceil(N / 32)]``: bit ``k % 32`` of word ``k // 32`` is element ``k``.
        alpha: float32 ``[V]``.
        weight_ties: see :class:`filbert.nn.LinearBinary`.
    """

    weight: Tensor
    alpha: Tensor
    signs: Tensor

    def __init__(self, num_embeddings: int, features: int) -> None:
        """An empty table, whose tensors are to be loaded."""
        super().__init__()
        self.num_embeddings, self.features = num_embeddings, features
        self.weight_ties = 0
        shape = (num_embeddings, words_for(features))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("alpha", torch.zeros(num_embeddings))
        signs = 2.0 * (torch.arange(256)[:, None] >> torch.arange(8) & 1) - 1
        self.register_buffer("signs", signs, persistent=False)  # of the bits of a byte

    @classmethod
    def from_weight(
        cls, weight: Tensor, *, centre: str, granularity: str = "row", weight_ties: str = "zero"
    ) -> BinaryEmbedding:
        """From a latent float table ``[V, N]``; arguments of :func:`filbert.nn.weight_signs`.
        BiBERT centres by row, BiT by the whole table, BinaryBERT not at all; alpha is per row."""
        table = cls(*weight.shape)
        bits, table.alpha, table.weight_ties = weight_signs(
            weight, centre, granularity, weight_ties
        )
        # A part of the rows at a time: the bits of a large vocabulary are large as integers.
        words = [bits_to_words(part) for part in bits.split(4096)]
        table.weight = torch.cat(words) if words else table.weight
        return table

    def forward(self, ids: Tensor) -> Tensor:
        """Integers ``[...]``, int64 or int32, to float32 ``[..., N]``.

        Raises:
            ValueError: ids of another dtype.
            IndexError: ids below 0 or past the table (on CUDA, a device-side assertion).
        """
        check_ids("ids", ids)
        alpha = F.embedding(ids, self.alpha[:, None])  # refuses what would count from the end
        rows = self.weight[ids].view(torch.uint8).int()  # little-endian: low bits first
        return self.signs[rows].flatten(-2)[..., : self.features] * alpha

    def _apply(self, fn: Any, recurse: bool = True) -> BinaryEmbedding:
        device = fn(torch.empty(0, device=self.alpha.device)).device
        return super()._apply(lambda t: t.to(device), recurse)

    def config(self) -> dict[str, Any]:
        """What the constructor needs to make an equal table with tensors yet to be loaded."""
        return {"num_embeddings": self.num_embeddings, "features": self.features}

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.features}"
