"""The modules a converted model is made of."""

from .dense import PackedLinear
from .packed_encoder import LayerParts, PackedEncoder, PackedLayer

__all__ = ["LayerParts", "PackedEncoder", "PackedLayer", "PackedLinear"]
