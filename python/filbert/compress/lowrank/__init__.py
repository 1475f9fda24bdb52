"""Weights of low rank: how factors are found, how ranks are chosen, and how a model gets them.

Paper: FlashSVD, arXiv 2508.01506.
"""

from ...nn.lowrank.factors import Factors
from .allocation import break_even, plan_ranks
from .conversion import factorize
from .elastic import use_rank
from .folders import load_factorized, save_factorized
from .peak import predicted_peak
from .report import FactorizationReport, factorization_report
from .spectrum import Spectrum, spectrum_of
from .training import FactorTraining

__all__ = [
    "FactorTraining",
    "FactorizationReport",
    "Factors",
    "Spectrum",
    "break_even",
    "factorization_report",
    "factorize",
    "load_factorized",
    "plan_ranks",
    "predicted_peak",
    "save_factorized",
    "spectrum_of",
    "use_rank",
]
