"""Random codes, weights and bits for the tests of the binary operators."""

from __future__ import annotations

import torch
from torch import Tensor

from filbert.ops.shared.words import bits_to_words, codes_to_words, weight_to_tiles


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """int64 in ``[low, high)``, the same on every run."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(low, high, shape, generator=generator, device="cpu")
    return values.to(torch.get_default_device())


def code_rows(rows: int, features: int, planes: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Codes ``[T, K]``, their words and their sums."""
    codes = integers(0, 2**planes, rows, features, seed=seed)
    return codes, *codes_to_words(codes, planes)


def weights(outputs: int, features: int, seed: int = 1) -> tuple[Tensor, ...]:
    """±1 weights ``[N, K]``, their tiles and totals."""
    bits = integers(0, 2, outputs, features, seed=seed)
    signs = 2 * bits - 1
    return signs, weight_to_tiles(bits), signs.sum(1).to(torch.int32)


def bit_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    """int32 ``[rows, width / 32]`` of random bits."""
    return bits_to_words(integers(0, 2, rows, width, seed=seed))
