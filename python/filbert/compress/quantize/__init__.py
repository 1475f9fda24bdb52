"""Weights of 2, 3, 4, 6 or 8 bits: how codes are chosen, and how a model gets them.

Paper: Q-BERT, arXiv 1909.05840.
"""

from .conversion import quantize
from .gptq import gptq
from .report import QuantizationReport, quantization_report
from .rounding import half_quadratic, round_to_nearest

__all__ = [
    "QuantizationReport",
    "gptq",
    "half_quadratic",
    "quantization_report",
    "quantize",
    "round_to_nearest",
]
