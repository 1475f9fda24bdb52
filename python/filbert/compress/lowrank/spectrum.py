"""Factors of a weight, for all ranks at once, and what is lost by them.

Papers: FlashSVD, arXiv 2508.01506; SVD-LLM, arXiv 2403.07378 (whitening); FWSVD, arXiv 2207.00112
(Fisher weights).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...nn.lowrank.factors import Factors

__all__ = ["Spectrum", "spectrum_of"]


@dataclass(frozen=True)
class Spectrum:
    """All ranks of a weight at once.

    Attributes:
        basis: ``[N, min(N, K)]``, float64: directions of the results, the largest first.
        energy: ``[min(N, K)]``, float64: what each direction carries of the results' squares, or of
            the weight's where nothing is known of the rows. Rank R loses the sum of those from R
            on, and no other factors of that rank lose less.
        weight: ``[N, K]``, float64.
        scale: ``[N]``, float64: what rows were multiplied by before, or None.
    """

    basis: Tensor
    energy: Tensor
    weight: Tensor
    scale: Tensor | None = None

    def factors(self, rank: int) -> Factors:
        """The best factors of a rank.

        With B an orthonormal basis of the directions kept, A is ``B.T @ W``: nothing is divided by,
        however few rows were seen.

        Args:
            rank: R, from 1 to min(N, K).

        Raises:
            ValueError: another rank.
        """
        if not 1 <= rank <= len(self.energy):
            raise ValueError(f"rank: got {rank}, need 1 to {len(self.energy)}")
        b = self.basis[:, :rank]
        if self.scale is None:
            return Factors((b.T @ self.weight).float(), b.float().contiguous())
        a = b.T @ (self.weight * self.scale[:, None])
        return Factors(a.float(), (b / self.scale[:, None]).float())

    def kept(self, rank: int) -> float:
        """The share of the energy that a rank keeps, from 0 to 1."""
        total = float(self.energy.sum())
        return float(self.energy[:rank].sum()) / total if total > 0 else 1.0


def spectrum_of(
    weight: Tensor, moments: Tensor | None = None, fisher: Tensor | None = None
) -> Spectrum:
    """The directions of a weight's results, in the order of their worth.

    Without further knowledge that is the singular value decomposition of the weight. With moments
    of the rows it is that of the results on these rows, which is what matters: the weights of
    encoders are not of low rank, their results nearly are.

    Args:
        weight: ``[N, K]``.
        moments: ``X.T @ X`` ``[K, K]`` of calibration rows, padding excluded; less their mean where
            a bias takes what it makes of the error.
        fisher: ``[N]``, what an error of each output costs, or None. Outputs are weighted by its
            square root.

    Raises:
        ValueError: shapes that do not fit, or numbers that are negative or no numbers.

    Papers: SVD-LLM, arXiv 2403.07378; FWSVD, arXiv 2207.00112.
    """
    outputs, inputs = weight.shape
    wide, scale = weight.detach().double(), None
    if not wide.isfinite().all():
        raise ValueError("weight: has values that are no finite numbers")
    if fisher is not None:
        scale = _scale_of(fisher, outputs)
    scaled = wide if scale is None else wide * scale[:, None]
    if moments is None:
        basis, values, _ = torch.linalg.svd(scaled, full_matrices=False)
        return Spectrum(basis, values.square(), wide, scale)
    if moments.shape != (inputs, inputs):
        raise ValueError(f"moments: got {tuple(moments.shape)}, need [{inputs}, {inputs}]")
    products = moments.double()
    products = (products + products.T) / 2
    if outputs <= inputs:
        energy, basis = torch.linalg.eigh(scaled @ products @ scaled.T)
        return Spectrum(basis.flip(1), energy.flip(0).clamp(min=0), wide, scale)
    values, vectors = torch.linalg.eigh(products)
    root = vectors * values.clamp(min=0).sqrt()
    basis, values, _ = torch.linalg.svd(scaled @ root, full_matrices=False)
    return Spectrum(basis, values.square(), wide, scale)


def _scale_of(fisher: Tensor, outputs: int) -> Tensor:
    if fisher.shape != (outputs,):
        raise ValueError(f"fisher: got {tuple(fisher.shape)}, need [{outputs}]")
    wide = fisher.double()
    if not wide.isfinite().all() or (wide < 0).any():
        raise ValueError("fisher: has values that are negative or no finite numbers")
    # An output that costs nothing is worth little, and must not be divided by.
    return wide.clamp(min=1e-6 * max(float(wide.mean()), 1e-30)).sqrt()
