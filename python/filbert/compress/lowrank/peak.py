"""How much memory the activations of a packed encoder take at their peak."""

from __future__ import annotations

from typing import Any

from ...conversion.hugging_face.holders import module_of
from ...conversion.swap import SwappedEncoder
from ...nn.layer import EncoderLayer
from ...nn.lowrank.attention import LowRankAttention
from ...nn.lowrank.feed_forward import FeedForwardLowRank

__all__ = ["predicted_peak"]


def predicted_peak(model: Any, rows: int) -> int:
    """Bytes of all activations of the layers together at their peak, on a CPU, for so many tokens.

    What embeddings, masks and results of the model take is no part of it, nor the working memory of
    kernels, which is a few hundred KB for each thread.

    Args:
        model: with an encoder of dense or low-rank slots that is packed.
        rows: tokens of a batch, without padding.

    Raises:
        ValueError: no packed encoder, or slots of another kind.
    """
    layers = [
        layer
        for encoder in module_of(model, "predicted_peak").modules()
        if isinstance(encoder, SwappedEncoder)
        for layer in encoder.layers
    ]
    if not layers:
        raise ValueError("predicted_peak: got no packed encoder; try filbert.factorize")
    return max(_peak_of(layer, rows) for layer in layers)


def _peak_of(layer: EncoderLayer, rows: int) -> int:
    attention, part = layer.attention, layer.feed_forward
    if attention.kind not in ("dense", "lowrank") or part.kind not in ("dense", "lowrank"):
        raise ValueError("predicted_peak: got slots of bits, need dense or low-rank ones")
    width, inner, size = (
        layer.out.out_features,
        part.up.out_features,
        layer.out.compute_dtype.itemsize,
    )
    if isinstance(attention, LowRankAttention):
        projected = attention.query_key_value.rank_in_use
    else:
        projected = 3 * attention.width
    attending = rows * (width + projected + attention.width)
    # Everything after attention goes by blocks of rows, over the context where blocks are many.
    block = rows if layer.row_block is None else min(layer.row_block, rows)
    held = rows * (width + attention.width)
    wide = 0 if isinstance(part, FeedForwardLowRank) else inner
    finishing = held + block * (2 * width + wide)
    return int(max(attending, finishing) * size)
