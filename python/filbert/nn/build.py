"""A layer from someone else's modules, as a plan says which kind each slot is."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..plan import LayerPlan
from .binary.attention import BinaryAttention
from .binary.feed_forward import BinaryFeedForward
from .binary.linear import LinearBinary
from .dense.layer import dense_layer
from .dense.linear import gelu_kind
from .layer import EncoderLayer
from .parts import LayerParts

__all__ = ["build_layer", "why_not"]


def _activation_name(parts: LayerParts) -> str | None:
    """``"gelu"`` (erf) or ``"relu"`` where the activation is that function, else None."""
    if gelu_kind(parts.activation) == "gelu":
        return "gelu"
    x = torch.linspace(-4, 4, 65, device="cpu")
    try:
        same = torch.equal(parts.activation(x.clone()), F.relu(x))
    except Exception:  # an activation may want anything; one that fails here is no ReLU
        return None
    return "relu" if same else None


def why_not(parts: LayerParts, plan: LayerPlan) -> list[str]:
    """Why the slots of ``parts`` cannot be filled as ``plan`` says; empty if they can."""
    reasons = []
    if plan.attention == "binary" and parts.head_dim % 32:
        reasons.append(f"binary attention: got heads of {parts.head_dim}, need a multiple of 32")
    if plan.feed_forward == "binary" and _activation_name(parts) is None:
        reasons.append("binary feed-forward: got another activation, need GELU (erf) or ReLU")
    return reasons


def build_layer(parts: LayerParts, plan: LayerPlan, **dense: Any) -> EncoderLayer:
    """The layer of ``parts`` that ``plan`` describes.

    Binary slots are BiBERT's: centred signs of latent weights with a scale for each row, signs of
    rows, and -1 for a number that is 0.

    Args:
        parts: the original modules. They are read, not kept.
        plan: what :func:`why_not` has nothing against.
        dense: arguments of :func:`~filbert.nn.dense.layer.dense_layer`.

    Paper: BiBERT, arXiv 2203.06390.
    """
    if plan.out == "binary":  # a folded bias would be one of floats
        dense["fold_bias"] = False
    layer = dense_layer(parts, **dense)
    if plan.is_dense:
        return layer
    attention, out, feed_forward = layer.attention, layer.out, layer.feed_forward
    with torch.no_grad():
        if plan.out == "binary":
            out = LinearBinary.from_linear(parts.out)
        if plan.attention == "binary":
            sides = (parts.query, parts.key, parts.value)
            attention = BinaryAttention(
                [LinearBinary.from_linear(side) for side in sides], parts.num_heads, out.packer
            )
        if plan.feed_forward == "binary":
            up, down = LinearBinary.from_linear(parts.up), LinearBinary.from_linear(parts.down)
            feed_forward = BinaryFeedForward(up, down, _activation_name(parts) or "gelu")
    return EncoderLayer(attention, out, layer.attn_norm, feed_forward, layer.ffn_norm)
