"""Weights of a few bits, in the form the operator takes and in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cases import normal
from filbert import ops

BITS = (2, 3, 4, 6, 8)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Uniform from ``low`` to ``high - 1``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, device="cpu").to(
        torch.get_default_device()
    )


@dataclass
class Weight:
    """``numbers`` int64 ``[N, K]``, multiplied with those of their groups, and ``given``, what
    linear_grouped takes."""

    numbers: Tensor
    scale: Tensor
    given: dict[str, Any]


def weight_of(
    outputs: int,
    inputs: int,
    bits: int,
    *,
    group: int | None = None,
    zeros: bool = False,
    codes: Tensor | None = None,
    exact: bool = True,
    small: bool = False,
) -> Weight:
    """Random codes, multipliers and zeros. With ``exact`` scales are powers of two; with ``small``
    the products of multipliers and numbers are bytes."""
    if codes is None:
        codes = integers(0, 1 << bits, outputs, inputs)
    codes = codes.to(torch.uint8)
    groups = 1 if group is None else inputs // group
    multiplier = zero = None
    if group is not None:
        multiplier = integers(0, 256, outputs, groups, seed=1).to(torch.uint8)
        if small:
            multiplier = multiplier % ((127 >> (bits - 1)) + 1)
        elif bits == 8:  # so that no sum can exceed int32
            multiplier = multiplier >> 5
    if zeros:
        zero = integers(0, 1 << bits, outputs, groups, seed=2).to(torch.uint8)
    scale = torch.full((outputs,), 2.0**-4) if exact else normal(outputs, seed=3) * 0.01
    given = {
        "weight": ops.pack_grouped(codes, bits),
        "scale": scale,
        "totals": ops.grouped_totals(codes, bits, multiplier, zero),
        "bits": bits,
        "multiplier": None if multiplier is None else ops.pack_groups(multiplier),
        "offset": None if zero is None else ops.grouped_offsets(zero, bits, multiplier),
    }
    numbers = codes.long().unflatten(1, (groups, -1))
    numbers = numbers - ((1 << (bits - 1)) if zero is None else zero.long().unsqueeze(-1))
    if multiplier is not None:
        numbers = numbers * multiplier.long().unsqueeze(-1)
    return Weight(numbers.flatten(1), scale, given)


def code_rows(rows: int, inputs: int, seed: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, and scales that are powers of two."""
    codes = integers(0, 256, rows, inputs, seed=seed).to(torch.uint8)
    scale = 2.0 ** integers(-3, 3, rows, seed=seed + 1).float()
    return codes, scale, integers(0, 256, rows, seed=seed + 2).int()


def sums_of(codes: Tensor, zero: Tensor, weight: Weight) -> Tensor:
    """The exact sums; float64 holds these integers."""
    return (codes.double() - zero.double()[:, None]) @ weight.numbers.double().T
