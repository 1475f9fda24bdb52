"""The modules a converted model is made of."""

from .binary.attention import BinaryAttention, MixedAttention
from .binary.bert import BinaryBert, BinaryBertOutput
from .binary.dot_packer import DotPacker
from .binary.embedding import BinaryEmbedding
from .binary.feed_forward import BinaryFeedForward
from .binary.linear import LinearBinary, weight_tiles
from .binary.linear_sum import LinearBinarySum
from .binary.row_packer import RowPacker
from .binary.thresholds import integer_threshold_of, threshold_of
from .build import dense_layer
from .dense.attention import DenseAttention
from .dense.linear import PackedLinear
from .encoder import PackedEncoder
from .file import load_encoder
from .grouped.embedding import EmbeddingGrouped
from .grouped.linear import LinearGrouped
from .grouped.weight import GroupedWeight
from .layer import EncoderLayer, FeedForward, RowNorm
from .lowrank.attention import LowRankAttention
from .lowrank.factors import Factors, GroupedFactors
from .lowrank.feed_forward import FeedForwardLowRank
from .lowrank.grouped import LinearLowRankGrouped
from .lowrank.linear import LinearLowRank
from .parts import LayerParts

__all__ = [
    "BinaryAttention",
    "BinaryBert",
    "BinaryBertOutput",
    "BinaryEmbedding",
    "BinaryFeedForward",
    "DenseAttention",
    "DotPacker",
    "EmbeddingGrouped",
    "EncoderLayer",
    "Factors",
    "FeedForward",
    "FeedForwardLowRank",
    "GroupedFactors",
    "GroupedWeight",
    "LayerParts",
    "LinearBinary",
    "LinearBinarySum",
    "LinearGrouped",
    "LinearLowRank",
    "LinearLowRankGrouped",
    "LowRankAttention",
    "MixedAttention",
    "PackedEncoder",
    "PackedLinear",
    "RowNorm",
    "RowPacker",
    "dense_layer",
    "integer_threshold_of",
    "load_encoder",
    "threshold_of",
    "weight_tiles",
]
