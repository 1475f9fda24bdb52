"""The forty lines of plain PyTorch that every kernel of filbert has to beat.

Pack, one QKV product per layer, an SDPA call per sequence, oneDNN linear layers whose weights are
packed once, unpack. No code of filbert's is used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneDnnLinear:
    """A dense layer whose weight oneDNN has re-ordered once, for about ``rows`` rows."""

    def __init__(self, layers: list[Any], rows: int, activation: str = "none") -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.bias = torch.cat([layer.bias.detach() for layer in layers])
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self.activation, [], "none"
        )


class Prototype(nn.Module):
    """``prototype(input_ids, attention_mask) -> [B, S, N]`` from a Hugging Face BertModel."""

    def __init__(self, bert: Any, rows: int) -> None:
        super().__init__()
        self.embeddings, self.heads = bert.embeddings, bert.config.num_attention_heads
        if bert.config.hidden_act != "gelu":
            raise ValueError(f"need hidden_act 'gelu', got {bert.config.hidden_act!r}")
        # On AVX2 oneDNN's GELU post-op costs more than the product it is fused to.
        self.fused = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        self.layers = []
        for layer in bert.encoder.layer:
            a, act = layer.attention, "gelu" if self.fused else "none"
            qkv = OneDnnLinear([a.self.query, a.self.key, a.self.value], rows)
            out, up = OneDnnLinear([a.output.dense], rows), [layer.intermediate.dense]
            down = OneDnnLinear([layer.output.dense], rows)
            norms = (a.output.LayerNorm, layer.output.LayerNorm)
            self.layers.append((qkv, out, OneDnnLinear(up, rows, act), down, *norms))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids)
        kept = attention_mask.flatten().nonzero().squeeze(1)
        lengths = attention_mask.sum(1).tolist()
        x = hidden.flatten(0, 1).index_select(0, kept)
        for qkv, out, up, down, norm1, norm2 in self.layers:
            rows = qkv(x).view(1, x.shape[0], 3, self.heads, -1).transpose(1, 3)  # [1, H, 3, T, D]
            parts = [  # four dimensions: with three, SDPA leaves its fused kernel
                F.scaled_dot_product_attention(*part.unbind(2)).transpose(1, 2).flatten(2)
                for part in rows.split(lengths, dim=3)
            ]
            x = norm1(out(torch.cat(parts, 1)[0]) + x)
            grown = up(x) if self.fused else F.gelu(up(x))
            x = norm2(down(grown) + x)
        padded = x.new_zeros(hidden.shape).flatten(0, 1)
        return padded.index_copy_(0, kept, x).view_as(hidden)
