"""The pieces of a binarized BERT: linear layer, embedding, attention, layer and encoder.

They are eager PyTorch, for training and as the meaning that kernels are held to. Latent weights are
float and stay float in a checkpoint; bits are made of them at every call. Parameters are *named* in
a state dict as in the published checkpoints, so that either loads here: see
:func:`~filbert.compress.binarize.published.publish`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .options import QuantizerOptions, no_scale, options_of
from .products import product
from .published import UNREAD, publish
from .quantizers import Quantized, bool_ste, keep_negative, one_of
from .weights import binarize_weight, quantize_weight

__all__ = [
    "BinarizedEmbedding",
    "BinarizedEncoder",
    "BinarizedLayer",
    "BinarizedLinear",
    "BinarizedSelfAttention",
    "QuantizerOptions",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class BinarizedLinear(nn.Linear):
    """``quantizer(x) @ (alpha * signs).T + bias``, with a latent float weight.

    Integers are summed before they are scaled, see
    :func:`~filbert.compress.binarize.products.product`.

    Args:
        in_features, out_features, bias, device, dtype: as of ``nn.Linear``.
        scheme: ``"bibert"``, ``"bit"`` or ``"binarybert"``.
        unsigned: whether the input is never negative: after a ReLU, BiT binarizes to {0, a}.
        options: all further choices; the scheme's own if not given.

    Raises:
        ValueError: an unknown scheme, or options that contradict it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        scheme: str = "bibert",
        unsigned: bool = False,
        options: QuantizerOptions | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.options = options_of(options, scheme)
        self.quantizer = self.options.quantizer(in_features, unsigned, device=device, dtype=dtype)
        names = {"quantizer.scale": "input_clip_val", "quantizer.move": "move.bias"}
        publish(self, names, UNREAD + no_scale(self.quantizer, "input_clip_val"))

    def binary_weight(self) -> Tensor:
        """``alpha * signs`` ``[out, in]``, with the scheme's gradient."""
        return self._quantized_weight().value

    def _quantized_weight(self) -> Quantized:
        options = self.options
        return quantize_weight(self.weight, options.scheme, options.granularity, options.ties)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``x`` is ``[..., in]``; ``keep`` boolean ``[...]`` names the rows that count when a scale
        is calibrated, and changes nothing else."""
        value, signs, alpha, _ = self._quantized_weight()
        weight = Quantized(value.mT, signs.mT, alpha.mT if alpha.ndim else alpha)
        y = product(self.quantizer.quantize(x, keep), weight)
        return y if self.bias is None else y + self.bias


class BinarizedEmbedding(nn.Embedding):
    """A word embedding whose rows are ``alpha * signs``.

    alpha is per row for each scheme; BiT centres by the mean of the whole table.

    Args:
        num_embeddings, embedding_dim, padding_idx: as of ``nn.Embedding``.
        scheme, options: as of :class:`BinarizedLinear`; a ``granularity`` does not apply.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        scheme: str = "bibert",
        options: QuantizerOptions | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.options = options_of(options, scheme)
        publish(self, {}, ("embed_clip_val", "weight_clip_val"))

    def forward(self, input: Tensor) -> Tensor:
        """``[..., embedding_dim]`` for ``[...]`` indices; only rows that occur are binarized."""
        rows = super().forward(input)
        return binarize_weight(rows, self.options.scheme, "row", self.options.ties, self.weight)


class BinarizedSelfAttention(nn.Module):
    """Self-attention on quantized Q, K and V, each of a binarized projection.

    - ``"bibert"``: Bi-Attention. ``A = bool(sign(Q) sign(K)^T / sqrt(d))``, no softmax; the context
      ``A sign(V)`` is a whole number.
    - ``"bit"``: ``A`` is the softmax of the scores of elastic Q and K, binarized to {0, a}; the
      learned scales of Q, K and V have no shift.
    - ``"binarybert"``: a few bits for Q, K, V and the softmax.

    A masked key has no weight. Dropout acts on what is then quantized: BiBERT's scores, else the
    softmax.

    Args:
        hidden_size: split evenly over ``heads``.
        heads: number of heads.
        scheme, options: as of :class:`BinarizedLinear`.
        dropout: probability.

    Raises:
        ValueError: ``hidden_size`` that ``heads`` does not divide, and as BinarizedLinear.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        scheme: str = "bibert",
        options: QuantizerOptions | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or hidden_size % heads:
            raise ValueError(
                f"hidden_size: got {hidden_size} for {heads} heads, need a multiple; try "
                "heads of 64 values"
            )
        self.options = options_of(options, scheme)
        self.heads = heads
        factory = {"device": device, "dtype": dtype}
        for name in ("query", "key", "value"):
            linear = BinarizedLinear(
                hidden_size, hidden_size, scheme=scheme, options=self.options, **factory
            )
            setattr(self, name, linear)
            setattr(self, f"{name}_quantizer", self.options.quantizer(None, **factory))
        if scheme != "bibert":
            self.weight_quantizer = self.options.quantizer(None, True, **factory)
        self.dropout = nn.Dropout(dropout)
        names = {f"{n}_quantizer.scale": f"clip_{n}" for n in ("query", "key", "value")}
        names["weight_quantizer.scale"] = "clip_attn"
        publish(self, names, UNREAD + no_scale(self.options.quantizer(None), *names.values()))

    def _split(self, x: Tensor) -> Tensor:
        """``[B, S, hidden]`` -> ``[B, heads, S, d]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _quantized(self, name: str, x: Tensor, keep: Tensor | None) -> Quantized:
        """``[B, heads, S, d]`` of what a projection returns, ``[B, S, hidden]``."""
        quantizer = getattr(self, f"{name}_quantizer")
        one = quantizer.quantize(x.unflatten(-1, (self.heads, -1)), keep)
        worth = one.worth.transpose(1, 2) if one.worth.ndim else one.worth
        return Quantized(one.value.transpose(1, 2), one.codes.transpose(1, 2), worth, one.wide)

    def forward(
        self, x: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Attends within each sequence.

        Args:
            x: ``[B, S, hidden]``.
            keep: boolean ``[B, S]``, True for tokens and False for padding; all if not given.

        Returns:
            The context ``[B, S, hidden]``, and Q, K and V ``[B, heads, S, d]`` as they are before
            they are quantized, which is what distillation compares.
        """
        raw = [getattr(self, name)(x, keep) for name in ("query", "key", "value")]
        q, k, v = (
            self._quantized(name, one, keep)
            for name, one in zip(("query", "key", "value"), raw, strict=True)
        )
        scores = _matmul(q, _transposed(k)) / math.sqrt(q.value.shape[-1])  # [B, heads, S, S]
        masked = None if keep is None else ~keep[:, None, None, :]
        if self.options.scheme == "bibert":
            value = bool_ste(self.dropout(scores), self.options.score_ties)
            chosen = Quantized(value, value.detach(), value.new_ones(()))
        else:
            if masked is not None:
                scores = scores.masked_fill(masked, torch.finfo(scores.dtype).min)
            weights = self.dropout(scores.softmax(-1))
            real = None
            if keep is not None:
                real = (keep[:, None, :, None] & keep[:, None, None, :]).expand_as(weights)
            chosen = self.weight_quantizer.quantize(weights, real)
        if masked is not None:
            value, codes = (t.masked_fill(masked, 0) for t in (chosen.value, chosen.codes))
            chosen = chosen._replace(value=value, codes=codes)
        context = _matmul(chosen, v).transpose(1, 2).flatten(2)
        return context, (self._split(raw[0]), self._split(raw[1]), self._split(raw[2]))


def _matmul(a: Quantized, b: Quantized) -> Tensor:
    """Signs are summed before they are scaled; several bits are multiplied as numbers."""
    return a.value @ b.value if a.wide else product(a, b)


def _transposed(x: Quantized) -> Quantized:
    return x._replace(value=x.value.mT, codes=x.codes.mT)


class _Residual(nn.Module):
    """A binarized linear layer, then the residual and LayerNorm in float."""

    def __init__(
        self, sizes: tuple[int, int], options: QuantizerOptions, eps: float, dropout: float,
        unsigned: bool, **factory: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dense = BinarizedLinear(
            *sizes, scheme=options.scheme, options=options, unsigned=unsigned, **factory
        )
        self.LayerNorm = nn.LayerNorm(sizes[1], eps=eps, **factory)
        self.dropout = nn.Dropout(dropout)
        publish(self, {})

    def forward(self, x: Tensor, residual: Tensor, keep: Tensor | None) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x, keep)) + residual)


class BinarizedLayer(nn.Module):
    """One layer of a BERT encoder, its four projections and attention binarized.

    BiBERT's feed-forward network takes the sign of a GELU, BiT's binarizes a ReLU to {0, a}. With
    ties ``"above"`` a GELU that has underflowed to -0.0 counts as negative.

    Args:
        hidden_size, heads, intermediate_size: sizes.
        options: how everything in it is quantized.
        activation: ``"gelu"`` or ``"relu"``.
        eps: of both LayerNorms.
        dropout, attention_dropout: probabilities.

    Raises:
        ValueError: as :class:`BinarizedSelfAttention`, or an unknown activation.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        intermediate_size: int,
        options: QuantizerOptions,
        *,
        activation: str = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of("activation", activation, tuple(ACTIVATIONS))
        factory = {"device": device, "dtype": dtype}
        scheme = options.scheme
        self.activation = activation
        self.keeps_negative = (activation, scheme, options.ties) == ("gelu", "bibert", "above")
        # The published names: attention.self, attention.output, intermediate.dense, output.
        attention = BinarizedSelfAttention(
            hidden_size, heads, scheme=scheme, options=options, dropout=attention_dropout, **factory
        )
        output = _Residual((hidden_size, hidden_size), options, eps, dropout, False, **factory)
        self.attention = nn.ModuleDict({"self": attention, "output": output})
        up = BinarizedLinear(
            hidden_size, intermediate_size, scheme=scheme, options=options, **factory
        )
        self.intermediate = nn.ModuleDict({"dense": up})
        self.output = _Residual(
            (intermediate_size, hidden_size), options, eps, dropout, activation == "relu", **factory
        )

    def forward(
        self, x: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """As :meth:`BinarizedSelfAttention.forward`, for the whole layer."""
        context, qkv = self.attention["self"](x, keep)
        x = self.attention["output"](context, x, keep)
        inner = self.intermediate["dense"](x, keep)
        between = ACTIVATIONS[self.activation](inner)
        if self.keeps_negative:
            between = keep_negative(between, inner)
        return self.output(between, x, keep), qkv


class BinarizedEncoder(nn.Module):
    """A stack of :class:`BinarizedLayer`, whose arguments it takes.

    Args:
        layers: how many.
    """

    def __init__(self, layers: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BinarizedLayer(*args, **kwargs) for _ in range(layers))

    def forward(
        self, x: Tensor, keep: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[tuple[Tensor, Tensor, Tensor], ...]]:
        """The hidden states ``[B, S, hidden]``, the input's first, and each layer's Q, K and V."""
        states, qkvs = [x], []
        for layer in self.layer:
            x, qkv = layer(x, keep)
            states.append(x)
            qkvs.append(qkv)
        return tuple(states), tuple(qkvs)
