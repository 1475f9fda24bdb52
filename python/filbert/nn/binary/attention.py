"""Self-attention between binary linear layers: in bits (BiBERT, BiT), or in floats (BinaryBERT).

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import ops
from ...packed.batch import PackedBatch
from ...packed.bits import PackedBits
from .dot_packer import DotPacker
from .linear import TILE, LinearBinary
from .linear_sum import LinearBinarySum, packer_of
from .row_packer import SCALE_FLOOR, RowPacker, one_of

__all__ = ["BinaryAttention", "MixedAttention"]

#: a context is a sum of at most this many ±1, more keys than any sequence has
_REACH = 1 << 20


def _fused(layers: Sequence[Any], fuse: bool) -> list[Any]:
    """One layer for query, key and value, where all take the same packed input; else the three."""
    first = layers[0]
    if not fuse:
        return list(layers)
    alike = all(isinstance(layer, LinearBinary) for layer in layers) and all(
        layer.packer.same_as(first.packer) and layer.out_features % TILE == 0 for layer in layers
    )
    return [LinearBinary.concat(layers)] if alike else list(layers)


class _BetweenBinary(nn.Module):
    """What both kinds of attention answer where a layer's slots are asked."""

    takes_more_rows = splits_query = False
    head_padding = 0
    row_block: int | None = None
    layers: nn.ModuleList
    heads: int
    head_dim: int

    @property
    def in_features(self) -> int:
        """N."""
        return cast(int, self.layers[0].in_features)

    @property
    def width(self) -> int:
        """H*D."""
        return self.heads * self.head_dim

    def linears(self) -> list[tuple[tuple[str, ...], Any]]:
        """See :meth:`filbert.nn.layer.EncoderLayer.linears`."""
        names = ("query", "key", "value")
        if len(self.layers) == 1:
            return [(names, self.layers[0])]
        return [((name,), layer) for name, layer in zip(names, self.layers, strict=True)]


class BinaryAttention(_BetweenBinary):
    """Packed rows in, the bits of the context out; nothing in between is a float.

    Query, key and value become ±1. A score is an integer; with BiBERT the keys with a positive one
    are chosen, with BiT those whose softmax rounds up (see :func:`filbert.attn_binary`). The
    context, a sum of chosen values, is an integer too, and is compared with integer thresholds that
    stand for what the output projection does to its input. Where query, key and value pack their
    input alike (BiBERT) they are one product.

    Args:
        layers: query, key and value, each N to H*D; or one layer with all three.
        heads: H.
        into: the packer of the output projection.
        score_ties: ``"below"`` does not choose a key whose score is 0, as the published BiBERT,
            ``"above"`` does, as its paper's equation. At 64 values a head a tenth of all scores is
            0 between random bits.
        score_scale: with BiT, what one unit of a score is worth in the softmax: the product of the
            scales of query and key over ``sqrt(D)``. None for BiBERT.
        prob_scale: with BiT, the step of the quantised softmax.
        value_scale: with BiT, what a value is worth.
        fuse: make one layer of the three, where they pack their input alike.

    What a query, key, value or context exactly at its threshold becomes is ``into.ties``. With
    ``"exact"`` that is 0: the context is ternary, in two planes. In a layer whose query, key or
    value could be 0, attention is then computed from integers in eager PyTorch, slowly;
    :attr:`eager` says so.

    Raises:
        ValueError: shapes that do not fit.
    """

    gives_bits = True
    score_scale: Tensor | None
    prob_half: Tensor | None
    table: Tensor | None
    context_scale: Tensor

    def __init__(
        self,
        layers: Sequence[LinearBinary],
        heads: int,
        into: RowPacker,
        *,
        score_ties: str = "below",
        score_scale: float | None = None,
        prob_scale: float = 1.0,
        value_scale: float = 1.0,
        fuse: bool = True,
    ) -> None:
        super().__init__()
        one_of("score_ties", score_ties, ("below", "above"))
        width = sum(layer.out_features for layer in layers) // 3
        if len(layers) not in (1, 3) or width != into.features or width % (32 * heads):
            raise ValueError(
                f"layers: got {[m.out_features for m in layers]} outputs for {heads} heads into "
                f"{into.features} features, need query, key and value of equal size, a multiple of "
                "32 for each head"
            )
        self.layers = nn.ModuleList(_fused(layers, fuse))
        self.heads, self.head_dim = heads, width // heads
        self.score_ties = score_ties
        prob = max(prob_scale, SCALE_FLOOR)
        softmax = score_scale is not None

        def scalar(value: float | None, dtype: torch.dtype) -> Tensor | None:
            return None if value is None else torch.tensor(value, dtype=dtype)

        self.register_buffer("score_scale", scalar(score_scale, torch.float64))
        self.register_buffer("prob_half", scalar(prob / 2 if softmax else None, torch.float64))
        worth = torch.tensor(value_scale) * (prob if softmax else 1.0)
        self.register_buffer("context_scale", worth.float())
        self.derive(into)

    @property
    def kernel(self) -> str:
        """The operator between the projections."""
        return "eager" if self.eager else "attn_binary"

    def derive(self, out: Any) -> None:
        """Makes again what follows from the layers' alpha and bias, the scales and ``out``: the
        output projection, or its packer."""
        into = out if isinstance(out, RowPacker) else packer_of(out)
        signs = RowPacker.sign(self.layers[0].out_features, ties=into.ties)  # type: ignore[arg-type]
        self.codes = nn.ModuleList(layer.codes_for(signs) for layer in self.layers)  # type: ignore[operator]
        self.eager = any(bool(codes.ternary) for codes in self.codes)
        device = self.context_scale.device
        self.context = DotPacker(
            lambda count: self.context_scale * count.float(), _REACH, into, device=device
        )
        table = None
        if self.score_scale is not None:
            table = ops.softmax_table(float(self.score_scale), self.head_dim, device)
        self.register_buffer("table", table, persistent=False)
        self._half = 0.0 if self.prob_half is None else float(self.prob_half)

    def query_key_value(self, rows: Tensor | PackedBits) -> list[PackedBits]:
        """The codes ``[T, H*D]`` of query, key and value, or all three in one."""
        return [
            layer.forward_bits(rows, codes)  # type: ignore[operator]
            for layer, codes in zip(self.layers, self.codes, strict=True)
        ]

    def forward(self, rows: Tensor | PackedBits, batch: PackedBatch) -> PackedBits:
        """Attends within each sequence.

        Args:
            rows: ``[T, N]`` floats, or bits where all three layers pack their input alike.
            batch: which rows are whose.

        Returns:
            Packed rows ``[T, H*D]``, input of the output projection.
        """
        codes = self.query_key_value(rows)
        if self.eager:
            values = [v for c in codes for v in c.unpack(torch.float64).chunk(3 // len(codes), 1)]
            counts = self._counts(values, batch).to(torch.float32)
            return self._packed(lambda t, ties: ops.pack_bits(counts, t.to(torch.float32), ties))
        q, k, v = (w for c in codes for w in c.words[0].chunk(3 // len(codes), 1))

        def attend(threshold: Tensor, ties: str) -> tuple[Tensor, Tensor]:
            return ops.attn_binary(
                q, k, v, batch.cu_seqlens, batch.max_seqlen, self.heads, self.head_dim,
                threshold=threshold, ties=ties, score_ties=self.score_ties, table=self.table,
                half=self._half,
            )  # fmt: skip

        return self._packed(attend)

    def _packed(self, compare: Callable[[Tensor, str], tuple[Tensor, Tensor]]) -> PackedBits:
        """The context's codes from what makes bits of its comparison with thresholds ``[H*D]`` and
        a choice of ties."""

        def make(above: Tensor, _: None, at: Tensor | None, __: None) -> tuple[Tensor, Tensor]:
            if at is None:
                return compare(above, "above")
            if self.context.all_tie:  # one pass gives both planes
                return compare(at, "exact")
            words, sums = compare(above, "above")
            lower, lower_sums = compare(at, "above")
            # The upper bit implies the lower one; the code is how many of them are 1.
            return torch.cat([words ^ lower, words & lower]), sums + lower_sums

        return self.context(make)

    def _counts(self, values: Sequence[Tensor], batch: PackedBatch) -> Tensor:
        """The context ``[T, H*D]`` of query, key and value of -1, 0 and 1, all float64: what
        ``attn_binary`` means for them."""
        out = torch.zeros_like(values[0])
        for begin, end in pairwise(batch.cu_seqlens.tolist()):
            if begin == end:
                continue
            q, k, v = (t[begin:end].unflatten(1, (self.heads, -1)).transpose(0, 1) for t in values)
            scores = q @ k.transpose(1, 2)
            if self.score_scale is None:
                chosen = scores >= 0 if self.score_ties == "above" else scores > 0
            else:
                weights = (self.score_scale * (scores - scores.amax(-1, keepdim=True))).exp()
                chosen = weights > self._half * weights.sum(-1, keepdim=True)
            out[begin:end] = (chosen.double() @ v).transpose(0, 1).flatten(1)
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> BinaryAttention:
        device = fn(torch.empty(0, device=self.context_scale.device)).device
        return super()._apply(lambda t: t.to(device), recurse)

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal module with tensors yet to be loaded."""
        return {
            "kind": "binary",
            "layers": [layer.config() for layer in self.layers],  # type: ignore[operator]
            "heads": self.heads,
            "score_ties": self.score_ties,
            "softmax": self.score_scale is not None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], out: Any) -> BinaryAttention:
        """The inverse of :meth:`config`; once tensors are loaded, call :meth:`derive`, as
        :class:`filbert.nn.EncoderLayer` does."""
        layers = [LinearBinary.from_config(layer) for layer in config["layers"]]
        return cls(
            layers, config["heads"], packer_of(out), score_ties=config["score_ties"],
            score_scale=1.0 if config["softmax"] else None, fuse=False,
        )  # fmt: skip


class MixedAttention(_BetweenBinary):
    """Float attention between binary linear layers, for activations of a few bits.

    Query, key, value and the softmax are rounded to a few bits as the model was trained with. A
    rounded probability needs the softmax's denominator first, which a fused kernel never has whole;
    so scores are made in PyTorch, some sequences at a time, padded to the longest. Without
    ``prob_levels`` the softmax is not rounded, and attention is :func:`filbert.attn_varlen`.

    Args:
        layers: query, key and value, each N to H*D; or one layer with all three.
        heads: H.
        bits: of query, key and value, or None not to round them.
        scales: float32 ``[4]``, the static steps of query, key, value and softmax; None for one of
            each row and head.
        clips: magnitudes that query, key and value are cut to before, or None.
        prob_levels: the largest code of a probability, or None not to round the softmax.
        fuse: as of :class:`BinaryAttention`.
    """

    gives_bits = False
    scales: Tensor | None
    #: scores that are made at a time, at most, but for one sequence's: 64 MiB
    SCORES_AT_A_TIME = 1 << 24

    def __init__(
        self,
        layers: Sequence[LinearBinary | LinearBinarySum],
        heads: int,
        *,
        bits: int | None = None,
        scales: Tensor | None = None,
        clips: Sequence[float] | None = None,
        prob_levels: int | None = None,
        fuse: bool = True,
    ) -> None:
        super().__init__()
        width = sum(layer.out_features for layer in layers) // 3
        if len(layers) not in (1, 3) or width % heads:
            raise ValueError(
                f"layers: got {[m.out_features for m in layers]} outputs for {heads} heads, need "
                "query, key and value of equal size, as much for each head"
            )
        self.layers = nn.ModuleList(_fused(layers, fuse))
        self.heads, self.head_dim = heads, width // heads
        self.bits, self.prob_levels = bits, prob_levels
        self.clips = None if clips is None else [float(clip) for clip in clips]
        self.register_buffer("scales", None if scales is None else scales.float())

    @property
    def kernel(self) -> str:
        """The operator between the projections."""
        return "attn_varlen" if self.prob_levels is None else "eager, softmax rounded"

    def derive(self, out: Any) -> None:
        """Nothing follows from other tensors here."""

    def query_key_value(self, rows: Tensor) -> list[Tensor]:
        """Query, key and value ``[T, H, D]``, not rounded yet."""
        parts = [y for layer in self.layers for y in layer(rows).chunk(3 // len(self.layers), 1)]
        return [y.unflatten(1, (self.heads, self.head_dim)) for y in parts]

    def rounded(self, x: Tensor, index: int) -> Tensor:
        """Query (0), key (1) or value (2) ``[T, H, D]`` at the precision attention sees."""
        if self.bits is None:
            return x
        high = 2 ** (self.bits - 1) - 1
        if self.clips is not None:
            x = x.clamp(-self.clips[index], self.clips[index])
        if self.scales is None:
            step = x.abs().amax(-1, keepdim=True) / high
            step = torch.where(step == 0, 1.0, step)
            return step * (x / step).round().clamp(-high, high)
        step = self.scales[index].clamp(min=SCALE_FLOOR).to(x.dtype)
        return step * (x / step).round().clamp(-high - (self.clips is None), high)

    def forward(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Attends within each sequence: rows ``[T, N]`` to ``[T, H*D]`` in their dtype."""
        q, k, v = (self.rounded(x, i) for i, x in enumerate(self.query_key_value(rows)))
        if self.prob_levels is not None:
            return self._attend(q.float(), k.float(), v.float(), batch).to(rows.dtype)
        context, _ = ops.attn_varlen(
            q, k, v, batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen,
            self.head_dim**-0.5, tiles=batch.tiles,
        )  # fmt: skip
        return context.flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        """The context ``[T, H*D]`` of rounded query, key and value ``[T, H, D]``."""
        longest = batch.max_seqlen
        if not len(q) or not longest:
            return torch.zeros_like(q).flatten(1)
        places = torch.arange(longest, device=q.device)
        inside = places < batch.lengths[:, None]  # [B, S]
        index = (batch.cu_seqlens[:-1, None] + places).clamp(max=len(q) - 1)
        step = max(1, self.SCORES_AT_A_TIME // (self.heads * longest * longest))
        parts = []
        for rows, keep in zip(index.split(step), inside.split(step), strict=True):
            qs, ks, vs = (t[rows].transpose(1, 2) for t in (q, k, v))  # [b, H, S, D]
            scores = qs @ ks.transpose(-1, -2) / self.head_dim**0.5
            probs = scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(-1)
            parts.append((self._rounded_probs(probs) @ vs).transpose(1, 2))
        # Where a row of the batch lies among the padded ones.
        sequence = batch.indices // batch.seq_len
        return torch.cat(parts).flatten(0, 1)[sequence * longest + batch.positions].flatten(1)

    def _rounded_probs(self, probs: Tensor) -> Tensor:
        high = self.prob_levels
        assert high is not None
        if self.scales is not None:
            step = self.scales[3].clamp(min=SCALE_FLOOR)
        else:
            step = probs.amax(-1, keepdim=True) / high
        return step * (probs / step).round().clamp(0, high)

    def _apply(self, fn: Any, recurse: bool = True) -> MixedAttention:
        device = fn(torch.empty(0, device=self._device())).device
        return super()._apply(lambda t: t.to(device), recurse)

    def _device(self) -> torch.device:
        return next(self.layers.buffers()).device

    def config(self) -> dict[str, Any]:
        """As :meth:`BinaryAttention.config`."""
        return {
            "kind": "mixed",
            "layers": [layer.config() for layer in self.layers],  # type: ignore[operator]
            "heads": self.heads,
            "bits": self.bits,
            "static": self.scales is not None,
            "clips": self.clips,
            "prob_levels": self.prob_levels,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], out: Any) -> MixedAttention:
        """As :meth:`BinaryAttention.from_config`."""
        from ..kinds import linear_from_config

        return cls(
            [linear_from_config(layer) for layer in config["layers"]],
            config["heads"], bits=config["bits"],
            scales=torch.ones(4) if config["static"] else None,
            clips=config["clips"], prob_levels=config["prob_levels"], fuse=False,
        )  # fmt: skip
