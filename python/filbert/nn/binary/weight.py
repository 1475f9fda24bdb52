"""The bits, scales and tiles of one-bit weights.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.shared.words import weight_to_tiles
from .row_packer import one_of

__all__ = ["totals_of", "weight_signs", "weight_tiles"]


def weight_tiles(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Weight bits in the layout of :func:`filbert.linear_binary`.

    Args:
        bits: ``[N, K]`` of 0 (weight -1) and 1 (weight +1), any dtype.

    Returns:
        ``tiles`` int32 ``[ceil(N / 16), ceil(K / 32), 16]``: word ``j`` of output ``16 i + l`` at
        ``[i, j, l]``, its bit ``b`` the weight of input ``32 j + b``; what pads N and K is 0.
        ``totals`` int32 ``[N]``, the sum of each output's ±1 weights.

    Raises:
        ValueError: not a matrix of zeros and ones.
    """
    if bits.ndim != 2 or not bool(((bits == 0) | (bits == 1)).all()):
        raise ValueError(
            f"bits: got {bits.dtype} {tuple(bits.shape)}, need [N, K] of zeros and ones; try "
            "(weight > 0)"
        )
    return weight_to_tiles(bits), totals_of(bits)


def totals_of(bits: Tensor) -> Tensor:
    return (2 * bits.sum(1, dtype=torch.int64) - bits.shape[1]).to(torch.int32)


def weight_signs(
    weight: Tensor, centre: str, granularity: str, ties: str = "zero"
) -> tuple[Tensor, Tensor, int]:
    """What a latent float weight is at inference: ``alpha * (2 * bits - 1)``.

    A weight equal to its centre has the sign 0 in the papers' reference, which no bit can hold.
    With ``ties="zero"`` a row of nothing else gets alpha 0, which is the same; single ones among
    others become -1 and are counted.

    Args:
        weight: ``[N, K]`` floating point; computed in float32.
        centre: what is subtracted: ``"row"`` or ``"tensor"`` mean, or ``"none"``.
        granularity: of alpha, the mean magnitude of the raw ``"row"`` or ``"tensor"``.
        ties: ``"zero"``, or ``"below"`` and ``"above"``: -1 and +1, in rows of ties too.

    Returns:
        ``bits`` bool ``[N, K]``, ``alpha`` float32 ``[N]``, and how many weights have a sign that
        the reference has not.

    Raises:
        ValueError: another shape or choice, or values that are not finite.
    """
    one_of("centre", centre, ("row", "tensor", "none"))
    one_of("granularity", granularity, ("row", "tensor"))
    one_of("ties of weights", ties, ("zero", "below", "above"))
    if weight.ndim != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError(
            f"weight: got {weight.dtype} {tuple(weight.shape)}, need a matrix [N, K] of finite "
            "floats; try the latent weights of the trained model"
        )
    w = weight.detach().float()
    middle = w.mean(-1, keepdim=True) if centre == "row" else w.mean()
    alpha = w.abs().mean(-1) if granularity == "row" else w.abs().mean().expand(w.shape[0])
    centred = w if centre == "none" else w - middle
    tied = centred == 0
    if ties == "above":
        return centred >= 0, alpha.clone(), int(tied[alpha != 0].sum())
    if ties == "zero":
        alpha = alpha.masked_fill(tied.all(-1), 0)
    return centred > 0, alpha.clone(), int(tied[alpha != 0].sum())
