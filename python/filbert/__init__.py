"""filbert: kernels that make BERT-type encoders faster and smaller, swapped in by one call.

    import filbert
    model = filbert.convert(model)   # in place; filbert.revert(model) undoes it
    print(filbert.report(model))

Importing filbert starts no CUDA context and imports no transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .conversion.in_place import ConvertError, convert, report, revert
from .conversion.pooling import embed
from .graphs import CapturedEncoder, capture
from .info import explain, info
from .nn.file import load_binary
from .ops import (
    attn_binary,
    attn_lowrank,
    attn_tiles,
    attn_varlen,
    bias_gelu_,
    embedding_grouped,
    ffn_lowrank,
    gather_rows,
    linear_binary,
    linear_binary_bits,
    linear_dense,
    linear_grouped,
    linear_grouped_codes,
    linear_lowrank,
    norm_residual,
    norm_residual_,
    norm_residual_codes,
    pack_bits,
    pack_codes,
    pack_dense,
    pack_heads,
    pad_factor,
    quantize_rows,
    softmax_table,
    unpack_dense,
)
from .packed.batch import PackedBatch
from .packed.bits import PackedBits
from .plan import EncoderPlan, LayerPlan, PackedEncoderConfig

if TYPE_CHECKING:
    from .compress.binarize.conversion import binarize
    from .compress.lowrank import (
        factorization_report,
        factorize,
        load_factorized,
        save_factorized,
        use_rank,
    )
    from .compress.quantize import (
        import_quantized,
        load_quantized,
        quantization_report,
        quantize,
        save_quantized,
    )

__version__ = "0.1.0"

__all__ = [
    "CapturedEncoder",
    "ConvertError",
    "EncoderPlan",
    "LayerPlan",
    "PackedBatch",
    "PackedBits",
    "PackedEncoderConfig",
    "__version__",
    "attn_binary",
    "attn_lowrank",
    "attn_tiles",
    "attn_varlen",
    "bias_gelu_",
    "binarize",
    "capture",
    "convert",
    "embed",
    "embedding_grouped",
    "explain",
    "factorization_report",
    "factorize",
    "ffn_lowrank",
    "gather_rows",
    "import_quantized",
    "info",
    "linear_binary",
    "linear_binary_bits",
    "linear_dense",
    "linear_grouped",
    "linear_grouped_codes",
    "linear_lowrank",
    "load_binary",
    "load_factorized",
    "load_quantized",
    "norm_residual",
    "norm_residual_",
    "norm_residual_codes",
    "pack_bits",
    "pack_codes",
    "pack_dense",
    "pack_heads",
    "pad_factor",
    "quantization_report",
    "quantize",
    "quantize_rows",
    "report",
    "revert",
    "save_factorized",
    "save_quantized",
    "softmax_table",
    "unpack_dense",
    "use_rank",
]


#: what is imported when it is first asked for, since all that trains comes with it
_LATER = {
    "binarize": ".compress.binarize.conversion",
    "factorization_report": ".compress.lowrank",
    "factorize": ".compress.lowrank",
    "import_quantized": ".compress.quantize",
    "load_factorized": ".compress.lowrank",
    "load_quantized": ".compress.quantize",
    "quantization_report": ".compress.quantize",
    "quantize": ".compress.quantize",
    "save_factorized": ".compress.lowrank",
    "save_quantized": ".compress.quantize",
    "use_rank": ".compress.lowrank",
}


def __getattr__(name: str) -> Any:
    """See ``_LATER``."""
    if name in _LATER:
        globals()[name] = getattr(import_module(_LATER[name], __name__), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
