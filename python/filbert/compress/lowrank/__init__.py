"""Weights of low rank: how factors are found, and how ranks are chosen.

Paper: FlashSVD, arXiv 2508.01506.
"""

from ...nn.lowrank.factors import Factors
from .allocation import break_even, plan_ranks
from .spectrum import Spectrum, spectrum_of

__all__ = ["Factors", "Spectrum", "break_even", "plan_ranks", "spectrum_of"]
