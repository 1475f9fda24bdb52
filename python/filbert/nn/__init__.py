"""The modules a converted model is made of."""

from .binary.attention import BinaryAttention, MixedAttention
from .binary.bert import BinaryBert, BinaryBertOutput, BinaryEncoder, BinaryLayer
from .binary.dot_packer import DotPacker
from .binary.embedding import BinaryEmbedding
from .binary.linear import LinearBinary, weight_tiles
from .binary.linear_sum import LinearBinarySum
from .binary.row_packer import RowPacker
from .binary.thresholds import integer_threshold_of, threshold_of
from .dense.linear import PackedLinear
from .encoder import LayerParts, PackedEncoder, PackedLayer

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
