"""Packed batches: which rows belong to which text, and rows of bits."""

from .batch import PackedBatch
from .bits import PackedBits

__all__ = ["PackedBatch", "PackedBits"]
