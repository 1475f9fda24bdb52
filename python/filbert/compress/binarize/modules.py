"""The pieces of a binarized BERT: linear layer, embedding, attention, layer and encoder.

They are eager PyTorch, for training and as the meaning that kernels are held to. Latent weights are
float and stay float in a checkpoint; bits are made of them at every call. Parameters are *named* in
a state dict as in the published checkpoints, so that either loads here: see :func:`publish`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantizers import (
    SCHEMES,
    ElasticBinarizer,
    Scaled,
    SignQuantizer,
    UniformQuantizer,
    binarize_weight,
    bool_ste,
    choose,
)

__all__ = [
    "BinarizedEmbedding",
    "BinarizedEncoder",
    "BinarizedLayer",
    "BinarizedLinear",
    "BinarizedSelfAttention",
    "QuantizerOptions",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}
#: entries of published checkpoints that their own forward pass never reads, per module
_UNREAD = ("weight_clip_val", "act_clip_val", "scale", "gate", "move_q.bias", "move_k.bias",
           "move_v.bias")  # fmt: skip


def publish(module: nn.Module, names: dict[str, str], unread: tuple[str, ...] = _UNREAD) -> None:
    """Gives entries of ``module``'s state dict their published names, when saved and when loaded.

    Args:
        module: whose entries; modules above it need nothing.
        names: our name -> the published one, both relative to ``module``.
        unread: published entries that mean nothing and are dropped when loaded.
    """

    def saved(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        for ours, theirs in names.items():
            if prefix + ours in state:
                state[prefix + theirs] = state.pop(prefix + ours)

    def loading(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
        for name in unread:
            state.pop(prefix + name, None)
        for ours, theirs in names.items():
            if prefix + theirs in state:
                value = state.pop(prefix + theirs)
                # A scale is saved as [1] by some versions of the published code.
                scalar = ours.endswith("scale") and value.numel() == 1
                state[prefix + ours] = value.reshape(()) if scalar else value

    module.register_state_dict_post_hook(saved)
    module.register_load_state_dict_pre_hook(loading)


class QuantizerOptions(NamedTuple):
    """What decides how a module quantizes.

    Attributes:
        scheme: ``"bibert"``, ``"bit"`` or ``"binarybert"``.
        ties: what a sign makes of 0, ``"zero"`` (``torch.sign``, the papers' reference),
            ``"below"`` or ``"above"``, in weights and activations. Only the last two fit in a bit:
            a packed model equals its eager one bit for bit where both use the same of these.
        score_ties: of BiBERT's ``bool(score)``: ``"below"`` (strictly above 0, as published) or
            ``"above"``. At 64 values a head, one score in ten is a tie.
        bits: of an activation; 1, or 2, 4 or 8 with ``"binarybert"``.
        mode: of ``bits > 1``, ``"static"`` or ``"row"``, see
            :class:`~filbert.compress.binarize.UniformQuantizer`.
        granularity: of a weight's scale, ``"row"`` or ``"tensor"``; None is the scheme's own.
    """

    scheme: str = "bibert"
    ties: str = "zero"
    score_ties: str = "below"
    bits: int = 1
    mode: str = "static"
    granularity: str | None = None

    def quantizer(
        self, channels: int | None, unsigned: bool = False, **factory: Any
    ) -> SignQuantizer | ElasticBinarizer | UniformQuantizer:
        """A new quantizer of activations.

        Args:
            channels: of the learned shift that BiT has, or None for none.
            unsigned: for inputs that are never negative.
            factory: ``device`` and ``dtype``.
        """
        if self.scheme == "bibert":
            return SignQuantizer(self.ties)
        if self.scheme == "bit":
            form = "bits" if unsigned else "sign"
            return ElasticBinarizer(channels, form, self.ties, **factory)
        return UniformQuantizer(self.bits, not unsigned, self.mode, **factory)


def _no_scale(quantizer: nn.Module, *names: str) -> tuple[str, ...]:
    """``names`` if ``quantizer`` learns no scale that such entries could be."""
    return () if isinstance(quantizer, Scaled) and quantizer.learned else names


def _options(options: QuantizerOptions | None, scheme: str) -> QuantizerOptions:
    choose("scheme", scheme, SCHEMES)
    if options is None:
        return QuantizerOptions(scheme, bits=8 if scheme == "binarybert" else 1)
    if options.scheme != scheme:
        raise ValueError(
            f"options: got {options.scheme!r} for a {scheme!r} module, need one scheme; try "
            f"options._replace(scheme={scheme!r})"
        )
    allowed = (2, 4, 8) if scheme == "binarybert" else (1,)
    choose(f"bits of an activation with {scheme!r}", options.bits, allowed)
    choose("score_ties", options.score_ties, ("below", "above"))
    return options


class BinarizedLinear(nn.Linear):
    """``quantizer(x) @ (alpha * signs).T + bias``, with a latent float weight.

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
        self.options = _options(options, scheme)
        self.quantizer = self.options.quantizer(in_features, unsigned, device=device, dtype=dtype)
        names = {"quantizer.scale": "input_clip_val", "quantizer.move": "move.bias"}
        publish(self, names, _UNREAD + _no_scale(self.quantizer, "input_clip_val"))

    def binary_weight(self) -> Tensor:
        """``alpha * signs`` ``[out, in]``, with the scheme's gradient."""
        options = self.options
        return binarize_weight(self.weight, options.scheme, options.granularity, options.ties)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """``x`` is ``[..., in]``; ``keep`` boolean ``[...]`` names the rows that count when a scale
        is calibrated, and changes nothing else."""
        return F.linear(self.quantizer(x, keep), self.binary_weight(), self.bias)


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
        self.options = _options(options, scheme)
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
        self.options = _options(options, scheme)
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
        publish(self, names, _UNREAD + _no_scale(self.options.quantizer(None), *names.values()))

    def _split(self, x: Tensor) -> Tensor:
        """``[B, S, hidden]`` -> ``[B, heads, S, d]``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

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
            self._split(getattr(self, f"{name}_quantizer")(one, keep))
            for name, one in zip(("query", "key", "value"), raw, strict=True)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # [B, heads, S, S]
        masked = None if keep is None else ~keep[:, None, None, :]
        if self.options.scheme == "bibert":
            chosen = bool_ste(self.dropout(scores), self.options.score_ties)
        else:
            if masked is not None:
                scores = scores.masked_fill(masked, torch.finfo(scores.dtype).min)
            weights = self.dropout(scores.softmax(-1))
            real = None
            if keep is not None:
                real = (keep[:, None, :, None] & keep[:, None, None, :]).expand_as(weights)
            chosen = self.weight_quantizer(weights, real)
        if masked is not None:
            chosen = chosen.masked_fill(masked, 0)
        context = (chosen @ v).transpose(1, 2).flatten(2)
        return context, (self._split(raw[0]), self._split(raw[1]), self._split(raw[2]))


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

    BiBERT's feed-forward network takes the sign of a GELU, BiT's binarizes a ReLU to {0, a}.

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
        choose("activation", activation, tuple(ACTIVATIONS))
        factory = {"device": device, "dtype": dtype}
        scheme = options.scheme
        self.activation = activation
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
        between = ACTIVATIONS[self.activation](self.intermediate["dense"](x, keep))
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
