"""A checkpoint's latent weights in one form, whatever its layout was."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...nn.binary.row_packer import SCALE_FLOOR, RowPacker

__all__ = ["LatentBert", "LatentLayer", "LatentLinear", "Linears"]


@dataclass(frozen=True)
class LatentLinear:
    """A linear layer's float weights, and how its published code makes bits of them.

    Attributes:
        name: in the checkpoint.
        weight: float32 ``[N, K]``.
        bias: float32 ``[N]`` or None.
        centre, granularity: see :func:`filbert.nn.binary.linear.weight_signs`.
        bits: of an input.
        signed: False for inputs that are never negative.
        scale: BiT's ``a``, BinaryBERT's static step, or None.
        shift: BiT's ``b``, float32 ``[K]``, or None.
        clip: magnitude that inputs are cut to, or None.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    centre: str
    granularity: str
    bits: int = 1
    signed: bool = True
    scale: float | None = None
    shift: Tensor | None = None
    clip: float | None = None

    def packer(self, ties: str) -> RowPacker:
        """How its input becomes bits."""
        features = self.weight.shape[1]
        if self.bits > 1:
            return RowPacker.uniform(
                features, self.bits, signed=self.signed, scale=self.scale, clip=self.clip
            )
        if self.signed:
            return RowPacker.sign(features, self.shift, ties)
        return RowPacker.elastic(features, 1.0 if self.scale is None else self.scale, self.shift)

    @property
    def input_scale(self) -> float:
        """What a one-bit input is worth."""
        return 1.0 if self.bits > 1 or self.scale is None else max(self.scale, SCALE_FLOOR)


Linears = tuple[LatentLinear, ...]  # one, or the two terms of a split layer


@dataclass(frozen=True)
class LatentLayer:
    """One encoder layer.

    ``scales`` are those of query, key, value and attention probabilities, None where there is none;
    ``clips`` cut query, key and value of a few bits.
    """

    query: Linears
    key: Linears
    value: Linears
    out: Linears
    up: Linears
    down: Linears
    attn_norm: tuple[Tensor, Tensor]
    ffn_norm: tuple[Tensor, Tensor]
    scales: tuple[float | None, ...] = (None, None, None, None)
    clips: tuple[float, ...] | None = None


@dataclass
class LatentBert:
    """A whole checkpoint.

    Attributes:
        prob_levels: with several bits, the largest code of an attention probability.
        ties: what a sign makes of 0 in the model's own code: ``"zero"``, ``"below"``, ``"above"``.
        notes: how the packed model differs from the model's own code, in words.
    """

    scheme: str
    heads: int
    eps: float
    activation: str
    words: tuple[Tensor, ...]
    word_centre: str
    word_granularity: str
    position: Tensor
    token_type: Tensor
    norm: tuple[Tensor, Tensor]
    layers: list[LatentLayer]
    pooler: Linears | None
    classifier: tuple[Tensor, Tensor] | None
    head: str
    bits: int = 1
    prob_levels: int = 1
    ties: str = "zero"
    score_ties: str = "below"
    notes: list[str] = field(default_factory=list)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the original's parameters in float32."""
        linears = [t for layer in self.layers for t in _tensors_of(layer)]
        heads = [] if self.classifier is None else [*self.classifier]
        pooler = [] if self.pooler is None else [t for p in self.pooler for t in (p.weight, p.bias)]
        rest = [*self.words, self.position, self.token_type, *self.norm, *heads, *pooler]
        return 4 * sum(t.numel() for t in [*linears, *rest] if t is not None)


def _tensors_of(layer: LatentLayer) -> list[Tensor | None]:
    sides = (layer.query, layer.key, layer.value, layer.out, layer.up, layer.down)
    linears = [linear for side in sides for linear in side]
    tensors = [t for linear in linears for t in (linear.weight, linear.bias)]
    return [*tensors, *layer.attn_norm, *layer.ffn_norm]
