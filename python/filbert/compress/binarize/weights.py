"""How a latent weight becomes a scale and signs, in the schemes of BiBERT (arXiv 2203.06390), BiT
(arXiv 2205.13016) and BinaryBERT (arXiv 2012.15701)."""

from __future__ import annotations

from torch import Tensor

from .quantizers import SCHEMES, Quantized, one_of, sign, straight_through

__all__ = ["binarize_weight", "quantize_weight", "weight_parts"]


def weight_parts(
    weight: Tensor,
    scheme: str,
    granularity: str | None = None,
    ties: str = "zero",
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scale and the signs a weight is replaced by, ``W ~ alpha * signs``.

    ========== =============== =============================
    scheme     alpha           signs
    ========== =============== =============================
    bibert     mean|W| of row  sign(W - mean of the row)
    bit        mean|W| of all  sign(W - mean of all)
    binarybert mean|W| of row  sign(W)
    ========== =============== =============================

    alpha is taken over the raw weight, not the centred one. A row of zeros has alpha 0, and so is 0
    with any ``ties``. A constant row equals its mean and is all ties: 0 in the papers' reference.
    NaN in a weight makes alpha NaN.

    Args:
        weight: ``[N, K]`` (or any ``[..., K]`` of rows), floating point.
        scheme: one of :data:`SCHEMES`.
        granularity: of alpha, ``"row"`` or ``"tensor"``; the scheme's own if not given.
        ties: see :func:`sign`.
        table: the tensor that whole-tensor statistics are of, where ``weight`` is rows gathered
            from it.

    Returns:
        alpha ``[N, 1]`` (``[]`` for a tensor) and signs ``[N, K]``, both in the weight's dtype.

    Raises:
        ValueError: an unknown scheme, granularity or ties.
    """
    one_of("scheme", scheme, SCHEMES)
    granularity = granularity or ("tensor" if scheme == "bit" else "row")
    one_of("granularity", granularity, ("row", "tensor"))
    weight = weight.detach()
    whole = weight if table is None else table.detach()
    by_row = granularity == "row"
    alpha = weight.abs().mean(-1, keepdim=True) if by_row else whole.abs().mean()
    return alpha, sign(_centred(weight, scheme, whole), ties)


def _centred(weight: Tensor, scheme: str, whole: Tensor) -> Tensor:
    if scheme == "bibert":
        return weight - weight.mean(-1, keepdim=True)
    return weight - whole.mean() if scheme == "bit" else weight


def binarize_weight(
    weight: Tensor,
    scheme: str,
    granularity: str | None = None,
    ties: str = "zero",
    table: Tensor | None = None,
) -> Tensor:
    """``alpha * signs`` of :func:`weight_parts`, with the gradient that the scheme trains with.

    BiBERT passes the gradient to the centred weight where that lies in [-1, 1], and through the
    centring, so a row's gradient sums to zero; BiT and BinaryBERT pass it unchanged. No scheme
    multiplies it by alpha, and none passes any through alpha.
    """
    return quantize_weight(weight, scheme, granularity, ties, table).value


def quantize_weight(
    weight: Tensor,
    scheme: str,
    granularity: str | None = None,
    ties: str = "zero",
    table: Tensor | None = None,
) -> Quantized:
    """:func:`binarize_weight` as its value, signs and alpha ``[N, 1]`` or ``[]``."""
    alpha, signs = weight_parts(weight, scheme, granularity, ties, table)
    if scheme != "bibert":
        return Quantized(straight_through(weight, alpha * signs), signs, alpha)
    centred = _centred(weight, scheme, weight)
    passes = centred.detach().abs() <= 1
    return Quantized(straight_through(centred, alpha * signs, passes), signs, alpha)
