"""Proves a packed model equal to the eager one it came from, part by part.

The eager side is written from the latent weights alone, in float32 and in the order in which its
published code computes, with one difference: a product of signs is summed before it is scaled and
not after, so that it is exact, as in filbert's own students. (Scaled first, as in the published
code, each of some hundred summands is rounded, and where biases are 0 that rounding decides ties.)

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nn import BinaryAttention, BinaryBert, EncoderLayer, LinearBinary, LinearBinarySum
from ...nn.binary.row_packer import SCALE_FLOOR
from ...packed.batch import PackedBatch
from ...packed.bits import PackedBits
from .latent import LatentBert, LatentLayer, LatentLinear, Linears
from .quantizers import keep_negative
from .student import BinarizedBert

__all__ = ["EagerBert", "PartReport", "compare", "compare_with_student"]

#: what additive masks say "hide" with
_HIDDEN = -10000.0
#: of the largest number: what differs by less differs by float rounding
_ROUNDING = 1e-4


@dataclass(frozen=True)
class PartReport:
    """How one part of the packed model compares with its eager meaning, on equal inputs.

    Attributes:
        part: ``layer 3: inner``.
        compared: how many values were.
        ties: how many of them are 0 in the eager model, which one bit cannot hold.
        mismatches: how many bits or codes differ, ties among them.
        difference: the largest difference of floats; None where only bits come out.
    """

    part: str
    compared: int
    ties: int
    mismatches: int
    difference: float | None = None


class EagerBert:
    """The model that a checkpoint means, part by part, on packed rows.

    Args:
        latent: its weights.
    """

    def __init__(self, latent: LatentBert) -> None:
        self.latent = latent

    def sign(self, x: Tensor) -> Tensor:
        """-1, 0 or 1, ties as the model's own code has them."""
        if self.latent.ties == "zero":
            return x.sign()
        return 2 * (x > 0 if self.latent.ties == "below" else x >= 0).float() - 1

    def codes(self, linear: LatentLinear, x: Tensor) -> tuple[Tensor, Tensor]:
        """The integers that inputs ``[T, K]`` become, and the worth of 1, ``[]`` or ``[T, 1]``."""
        one = torch.ones(())
        if linear.bits == 1:
            moved = x if linear.shift is None else x + linear.shift
            if linear.signed:
                return self.sign(moved), one * linear.input_scale
            worth = one * linear.input_scale
            return (moved / worth).round().clamp(0, 1), worth
        low, high = (
            (-(2 ** (linear.bits - 1)), 2 ** (linear.bits - 1) - 1)
            if linear.signed
            else (0, 2**linear.bits - 1)
        )
        if linear.scale is not None:
            step = one * max(linear.scale, SCALE_FLOOR)
            x = x if linear.clip is None else x.clamp(-linear.clip, linear.clip)
        else:
            step = (x.abs() if linear.signed else x.clamp(min=0)).amax(-1, keepdim=True) / high
            step = torch.where(step == 0, 1.0, step)
        return (x / step).round().clamp(low, high), step

    def signs(self, weight: Tensor, centre: str, granularity: str) -> tuple[Tensor, Tensor]:
        """The signs of a latent weight ``[N, K]`` and its scale ``[N]``."""
        middle = {"row": weight.mean(-1, keepdim=True), "tensor": weight.mean()}
        centred = weight - middle[centre] if centre in middle else weight
        size = weight.abs()
        alpha = size.mean(-1) if granularity == "row" else size.mean().expand(weight.shape[0])
        return self.sign(centred), alpha

    def product(self, linear: LatentLinear, codes: Tensor, worth: Tensor) -> Tensor:
        """``[T, N]`` from codes ``[T, K]`` that are worth ``worth`` each."""
        signs, alpha = self.signs(linear.weight, linear.centre, linear.granularity)
        dots = F.linear(codes, signs)
        # One scale for all inputs is known before there is a product to scale.
        y = dots * (alpha * worth) if linear.bits == 1 else dots * alpha * worth
        return y if linear.bias is None else y + linear.bias

    def linear(self, linears: Linears, x: Tensor) -> Tensor:
        """Float rows to float rows."""
        first, *rest = (self.product(one, *self.codes(one, x)) for one in linears)
        return sum(rest, start=first)

    def activate(self, x: Tensor) -> Tensor:
        if self.latent.activation != "gelu":
            return F.relu(x)
        y = F.gelu(x)
        # Only filbert's own students have ties "above".
        above = self.latent.scheme == "bibert" and self.latent.ties == "above"
        return keep_negative(y, x) if above else y

    def norm(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *norm, eps=self.latent.eps)

    def attention(self, layer: LatentLayer, qkv: Sequence[Tensor], batch: PackedBatch) -> Tensor:
        """The context ``[T, H*D]`` of query, key and value ``[T, H*D]`` before they are quantised;
        padded, with an additive mask, as the published code."""
        latent = self.latent
        dim = qkv[0].shape[1] // latent.heads
        q, k, v = (
            batch.unpack(self.quantised(t.unflatten(1, (-1, dim)), layer, index))
            for index, t in enumerate(qkv)
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, S, D]
        keep = batch.unpack(torch.ones(batch.num_rows))
        a_q, a_k, a_v, a_p = (max(1.0 if a is None else a, SCALE_FLOOR) for a in layer.scales)
        scores = q @ k.transpose(-1, -2)
        if latent.scheme == "bit":
            scores = scores * (a_q * a_k)
        scores = scores / math.sqrt(dim) + (1.0 - keep[:, None, None, :]) * _HIDDEN
        if latent.scheme == "bibert":
            above = latent.score_ties == "above"
            context = (scores >= 0 if above else scores > 0).float() @ v
        elif latent.scheme == "bit":
            chosen = (scores.softmax(-1) / a_p).round().clamp(0, 1)
            context = chosen @ v * (torch.tensor(a_p) * a_v)
        else:
            context = self._rounded_probs(scores.softmax(-1), layer.scales[3]) @ v
        return context.transpose(1, 2).reshape(-1, latent.heads * dim)[batch.indices]

    def _rounded_probs(self, probs: Tensor, scale: float | None) -> Tensor:
        high = self.latent.prob_levels
        step = probs.amax(-1, keepdim=True) / high
        if scale is not None:
            step = torch.tensor(max(scale, SCALE_FLOOR))
        return step * (probs / step).round().clamp(0, high)

    def quantised(self, x: Tensor, layer: LatentLayer, index: int) -> Tensor:
        """Query (0), key (1) or value (2) ``[T, H, D]`` as attention sees it; signs without their
        scale."""
        if self.latent.bits == 1:
            return self.sign(x)
        high = 2 ** (self.latent.bits - 1) - 1
        scale = layer.scales[index]
        if layer.clips is not None:
            x = x.clamp(-layer.clips[index], layer.clips[index])
        if scale is not None:
            step = torch.tensor(max(scale, SCALE_FLOOR))
        else:
            step = x.abs().amax(-1, keepdim=True) / high
            step = torch.where(step == 0, 1.0, step)
        static = scale is not None and layer.clips is None
        return step * (x / step).round().clamp(-high - static, high)

    def embed(self, ids: Tensor, places: Tensor, types: Tensor) -> Tensor:
        """Rows that enter the first layer; all ``[T]``."""
        latent = self.latent
        x = sum(self.words(ids), start=torch.zeros(()))
        x = x + latent.position[places] + latent.token_type[types]
        return self.norm(x, latent.norm)

    def words(self, ids: Tensor) -> list[Tensor]:
        """The rows of each word table ``[T, N]``."""
        rows = []
        for table in self.latent.words:
            signs, alpha = self.signs(table, self.latent.word_centre, self.latent.word_granularity)
            rows.append((alpha[:, None] * signs)[ids])
        return rows

    def layer(self, layer: LatentLayer, rows: Tensor, batch: PackedBatch) -> Tensor:
        """A whole layer on rows ``[T, N]``."""
        qkv = [self.linear(side, rows) for side in (layer.query, layer.key, layer.value)]
        context = self.attention(layer, qkv, batch)
        rows = self.norm(self.linear(layer.out, context) + rows, layer.attn_norm)
        inner = self.activate(self.linear(layer.up, rows))
        return self.norm(self.linear(layer.down, inner) + rows, layer.ffn_norm)


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def compare(
    latent: LatentBert, model: BinaryBert, input_ids: Tensor, mask: Tensor, types: Tensor
) -> list[PartReport]:
    """Every part of ``model`` against its eager meaning, each fed with what the packed model feeds
    it; then the whole model, where one differing bit changes all that follows.

    Args:
        latent: what ``model`` was made of.
        model: on the CPU, float32.
        input_ids, mask, types: ``[B, S]``.
    """
    eager = EagerBert(latent)
    batch = PackedBatch.from_mask(mask)
    ids, kinds, places = (
        input_ids.flatten()[batch.indices],
        types.flatten()[batch.indices],
        batch.indices % batch.seq_len,
    )
    words = sum((table(ids) for table in model.embeddings.words), start=torch.zeros(()))
    reference = sum(eager.words(ids), start=torch.zeros(()))
    wrong = words != reference
    rows = model.embed(input_ids, batch, types)
    zeros = int((wrong & (reference == 0)).sum())
    parts = [PartReport("words", words.numel(), zeros, int(wrong.sum()))]
    whole = eager.embed(ids, places, kinds)
    parts.append(PartReport("embeddings", rows.numel(), 0, 0, _largest(rows, whole)))
    for index, (layer, packed) in enumerate(zip(latent.layers, model.encoder.layers, strict=True)):
        assert isinstance(packed, EncoderLayer)
        found, rows = _compare_layer(eager, layer, packed, rows, batch)
        parts += [
            PartReport(f"layer {index}: {p.part}", p.compared, p.ties, p.mismatches, p.difference)
            for p in found
        ]
        whole = eager.layer(layer, whole, batch)
    if latent.pooler is not None and model.pooler is not None:
        first = rows[batch.starts[batch.lengths > 0]]
        ours, theirs = model.pooler(first).tanh(), eager.linear(latent.pooler, first).tanh()
        parts.append(PartReport("pooler", ours.numel(), 0, 0, _largest(ours, theirs)))
    parts.append(PartReport("whole model", rows.numel(), 0, 0, _largest(rows, whole)))
    return parts


@torch.no_grad()
def compare_with_student(
    student: BinarizedBert, packed: BinaryBert, ids: Tensor, mask: Tensor, types: Tensor
) -> PartReport:
    """The outputs of ``packed`` against the student's own forward pass, end to end.

    Args:
        student: what ``packed`` was made of; run in evaluation mode and left in the mode it is in.
        packed: in the student's dtype and on its device.
        ids, mask, types: ``[B, S]``.

    Returns:
        ``compared``: how many rows, of hidden states at real tokens, and of pooled outputs and
        logits of texts whose first token is real (the student pools whatever is first).
        ``mismatches``: how many of them differ by more than float rounding. ``difference``: the
        largest difference of all.
    """
    modes = {module: module.training for module in student.modules()}
    student.eval()
    try:
        theirs = student(ids, mask, types)
    finally:
        for module, mode in modes.items():
            module.training = mode
    ours = packed(ids, mask, types)
    keep = mask != 0
    first = keep[:, 0]
    pairs = [(ours.last_hidden_state[keep], theirs.last_hidden_state[keep])]
    for one, other in ((ours.pooler_output, theirs.pooler_output), (ours.logits, theirs.logits)):
        if one is not None and other is not None and one.ndim == other.ndim:
            pairs.append((one[first], other[first]))
    compared = wrong = 0
    largest = 0.0
    for one, other in pairs:
        if not one.numel():
            continue
        gaps = (one.double() - other.double()).abs().amax(-1)
        compared += gaps.numel()
        # What is NaN in one of them is no rounding.
        wrong += int((~(gaps <= _ROUNDING * max(1.0, float(other.abs().max())))).sum())
        largest = max(largest, float(gaps.nan_to_num(nan=math.inf).max()))
    return PartReport("trained model", compared, 0, wrong, largest)


def _compare_layer(
    eager: EagerBert, layer: LatentLayer, packed: EncoderLayer, rows: Tensor, batch: PackedBatch
) -> tuple[list[PartReport], Tensor]:
    attention, parts = packed.attention, []
    sides = (layer.query, layer.key, layer.value)
    raw = torch.cat([eager.linear(side, rows) for side in sides], 1)
    context: Tensor | PackedBits
    if isinstance(attention, BinaryAttention):
        ours = torch.cat([c.unpack() for c in attention.query_key_value(rows)], 1)
        parts.append(_bits("query, key, value", ours, eager.sign(raw)))
        context = bits = attention(rows, batch)
        numbers = eager.attention(layer, ours.chunk(3, 1), batch)
        parts.append(_against(eager, "attention", layer.out[0], bits, numbers))
    else:
        made = list(attention.layers) * (3 // len(attention.layers))
        wrong = sum(_codes(eager, *pair, rows) for pair in zip(sides, made, strict=True))
        unrounded = attention.query_key_value(rows)
        for index, x in enumerate(unrounded):
            theirs = eager.quantised(raw.chunk(3, 1)[index].reshape(x.shape), layer, index)
            wrong += int(((attention.rounded(x, index) - theirs).abs() > 1e-4).sum())
        ours = torch.cat([x.flatten(1) for x in unrounded], 1)
        parts.append(_floats("query, key, value", ours, raw, wrong))
        attended = attention(rows, batch)
        theirs = eager.attention(layer, raw.chunk(3, 1), batch)
        wrong = _codes(eager, layer.out, packed.out, attended)
        parts.append(_floats("attention", attended, theirs, wrong))
        context = attended
    middle = packed.out(context, residual=rows, norm=packed.attn_norm)
    theirs = eager.norm(_product(eager, layer.out, context) + rows, layer.attn_norm)
    parts.append(_floats("output", middle, theirs))
    inner = packed.feed_forward.inner_of(middle)
    numbers = eager.activate(eager.linear(layer.up, middle))
    if isinstance(inner, Tensor):
        wrong = _codes(eager, layer.up, packed.feed_forward.up, middle)
        wrong += _codes(eager, layer.down, packed.feed_forward.down, inner)
        parts.append(_floats("inner", inner, numbers, wrong))
    else:
        parts.append(_against(eager, "inner", layer.down[0], inner, numbers))
    rows = packed.feed_forward.down(inner, residual=middle, norm=packed.ffn_norm)
    theirs = eager.norm(_product(eager, layer.down, inner) + middle, layer.ffn_norm)
    return [*parts, _floats("feed-forward", rows, theirs)], rows


def _floats(part: str, ours: Tensor, theirs: Tensor, wrong: int = 0) -> PartReport:
    return PartReport(part, ours.numel(), 0, wrong, _largest(ours, theirs))


def _bits(part: str, ours: Tensor, theirs: Tensor) -> PartReport:
    wrong = int((ours != theirs).sum())
    return PartReport(part, ours.numel(), int((theirs == 0).sum()), wrong)


def _against(
    eager: EagerBert, part: str, linear: LatentLinear, ours: PackedBits, numbers: Tensor
) -> PartReport:
    """The bits that go into ``linear``, against those of the eager ``numbers``."""
    theirs, _ = eager.codes(linear, numbers)
    found = _bits(part, ours.unpack(), theirs)
    # Of {0, 1}, a 0 is no tie.
    return found if linear.signed else PartReport(part, found.compared, 0, found.mismatches)


def _product(eager: EagerBert, linears: Linears, x: Tensor | PackedBits) -> Tensor:
    """The eager product of what the packed layer was given."""
    if isinstance(x, Tensor):
        return eager.linear(linears, x)
    return eager.product(linears[0], x.unpack(), torch.tensor(linears[0].input_scale))


def _codes(eager: EagerBert, linears: Linears, packed: nn.Module, x: Tensor) -> int:
    """How many few-bit codes of float rows differ: kernels multiply by a reciprocal where the
    eager model divides, so that a number halfway between two codes may become either."""
    terms = packed.terms if isinstance(packed, LinearBinarySum) else [packed]
    wrong = 0
    for one, term in zip(linears, terms, strict=True):
        assert isinstance(term, LinearBinary)
        ours = term.pack(x)
        theirs, _ = eager.codes(one, x)
        wrong += int((ours.step * ours.unpack_codes() + ours.low != theirs).sum())
    return wrong
