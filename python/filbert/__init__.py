"""filbert: kernels that make BERT-type encoders faster and smaller, swapped in by one call.

    import filbert
    model = filbert.convert(model)   # in place; filbert.revert(model) undoes it
    print(filbert.report(model))

Importing filbert starts no CUDA context and imports no transformers.
"""

from .capture import CapturedEncoder, capture
from .config import PackedEncoderConfig
from .convert import ConvertError, convert, report, revert
from .info import explain, info
from .ops import (
    attn_tiles,
    attn_varlen,
    bias_gelu_,
    gather_rows,
    norm_residual,
    norm_residual_,
)
from .packing import PackedBatch
from .pooling import embed

__version__ = "0.1.0"

__all__ = [
    "CapturedEncoder",
    "ConvertError",
    "PackedBatch",
    "PackedEncoderConfig",
    "__version__",
    "attn_tiles",
    "attn_varlen",
    "bias_gelu_",
    "capture",
    "convert",
    "embed",
    "explain",
    "gather_rows",
    "info",
    "norm_residual",
    "norm_residual_",
    "report",
    "revert",
]
