"""Weights of 2, 3, 4, 6 or 8 bits: how codes are chosen, and how a model gets them.

Paper: Q-BERT, arXiv 1909.05840.
"""

from .allocation import BitPlan, plan_bits
from .conversion import quantize
from .gptq import gptq
from .report import QuantizationReport, quantization_report
from .rounding import half_quadratic, round_to_nearest
from .sensitivity import hessian_traces, top_eigenvalues

__all__ = [
    "BitPlan",
    "QuantizationReport",
    "gptq",
    "half_quadratic",
    "hessian_traces",
    "plan_bits",
    "quantization_report",
    "quantize",
    "round_to_nearest",
    "top_eigenvalues",
]
