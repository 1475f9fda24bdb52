"""Packed batches: which rows belong to which text, rows of bits, and rows of codes."""

from .batch import PackedBatch
from .bits import PackedBits
from .codes import QuantizedRows

__all__ = ["PackedBatch", "PackedBits", "QuantizedRows"]
