"""filbert: kernels that make BERT-type encoders faster and smaller, swapped in by one call."""

from .ops import attn_varlen, bias_gelu_, norm_residual, norm_residual_

__version__ = "0.1.0"

__all__ = ["__version__", "attn_varlen", "bias_gelu_", "norm_residual", "norm_residual_"]
