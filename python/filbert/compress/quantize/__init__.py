"""Weights of 2, 3, 4, 6 or 8 bits: how codes are chosen, and how a model gets them.

Paper: Q-BERT, arXiv 1909.05840.
"""

from .allocation import BitPlan, plan_bits
from .checkpoint import save_quantized
from .conversion import quantize
from .gptq import gptq
from .imports import import_quantized
from .loading import load_quantized, register
from .report import QuantizationReport, quantization_report
from .rounding import half_quadratic, round_to_nearest
from .sensitivity import hessian_traces, top_eigenvalues
from .training import StraightThrough

__all__ = [
    "BitPlan",
    "QuantizationReport",
    "StraightThrough",
    "gptq",
    "half_quadratic",
    "hessian_traces",
    "import_quantized",
    "load_quantized",
    "plan_bits",
    "quantization_report",
    "quantize",
    "register",
    "round_to_nearest",
    "save_quantized",
    "top_eigenvalues",
]
