"""The modules a converted model is made of."""

from .binary_attention import BinaryAttention, MixedAttention
from .binary_embedding import BinaryEmbedding
from .binary_encoder import BinaryBert, BinaryBertOutput, BinaryEncoder, BinaryLayer
from .dense import PackedLinear
from .dot_packer import DotPacker
from .linear_binary import LinearBinary, weight_tiles
from .linear_binary_sum import LinearBinarySum
from .packed_encoder import LayerParts, PackedEncoder, PackedLayer
from .row_packer import RowPacker
from .thresholds import integer_threshold_of, threshold_of

__all__ = [
    "BinaryAttention",
    "BinaryBert",
    "BinaryBertOutput",
    "BinaryEmbedding",
    "BinaryEncoder",
    "BinaryLayer",
    "DotPacker",
    "LayerParts",
    "LinearBinary",
    "LinearBinarySum",
    "MixedAttention",
    "PackedEncoder",
    "PackedLayer",
    "PackedLinear",
    "RowPacker",
    "integer_threshold_of",
    "threshold_of",
    "weight_tiles",
]
