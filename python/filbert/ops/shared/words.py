"""Rows of codes as planes of bits.

Bit ``p`` of code ``k`` is bit ``k % 32`` of word ``k // 32`` in plane ``p``, low bits first.
Everything about them is integer arithmetic, hence exact.
"""

from __future__ import annotations

import torch
from torch import Tensor


def words_for(features: int) -> int:
    """How many 32-bit words a plane of ``features`` bits takes."""
    return (features + 31) // 32


def bits_to_words(bits: Tensor) -> Tensor:
    """``[..., K]`` of 0 and 1 to int32 ``[..., ceil(K / 32)]``, padded with zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.int64), (0, -bits.shape[-1] % 32))
    groups = padded.unflatten(-1, (-1, 32)) << torch.arange(32, device=bits.device)
    words = groups.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def words_to_bits(words: Tensor, features: int) -> Tensor:
    """The inverse of :func:`bits_to_words`: int64 ``[..., features]`` of 0 and 1."""
    bits = words.to(torch.int64).unsqueeze(-1) >> torch.arange(32, device=words.device) & 1
    return bits.flatten(-2)[..., :features]


def codes_to_words(codes: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Codes ``[T, K]`` to their planes ``[planes, T, ceil(K / 32)]`` and row sums ``[T]``."""
    words = torch.stack([bits_to_words(codes >> p & 1) for p in range(planes)])
    return words, codes.sum(-1).to(torch.int32)


def words_to_codes(words: Tensor, features: int) -> Tensor:
    """The inverse: int64 codes ``[T, features]``."""
    weights = 1 << torch.arange(words.shape[0], device=words.device)
    return (words_to_bits(words, features) * weights[:, None, None]).sum(0)


def compare(x: Tensor, threshold: Tensor | float | int, ties: str) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` against ``threshold``: the planes and sums of what ``ties`` asks for."""
    above, below = x > threshold, x >= threshold
    codes = {"below": above.long(), "above": below.long(), "exact": above.long() + below.long()}
    return codes_to_words(codes[ties], 2 if ties == "exact" else 1)


def weight_to_tiles(bits: Tensor) -> Tensor:
    """Weight bits ``[N, K]`` to int32 ``[ceil(N/16), ceil(K/32), 16]``: see docs/binary.md."""
    words = bits_to_words(bits)
    words = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[0] % 16))
    return words.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def tiles_to_weight(tiles: Tensor, out_features: int, features: int) -> Tensor:
    """The inverse: int64 ``[N, K]`` of 0 and 1."""
    return words_to_bits(tiles.transpose(1, 2).flatten(0, 1), features)[:out_features]


def planes_like(like: Tensor, planes: int, rows: int, features: int) -> tuple[Tensor, Tensor]:
    words = like.new_empty((planes, rows, (features + 31) // 32), dtype=torch.int32)
    return words, like.new_empty((rows,), dtype=torch.int32)
