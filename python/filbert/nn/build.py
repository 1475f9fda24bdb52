"""A layer from someone else's modules, as a plan says which kind each slot is."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..plan import LayerPlan
from .binary.attention import BinaryAttention
from .binary.feed_forward import BinaryFeedForward
from .binary.linear import LinearBinary
from .dense.attention import DenseAttention, pad_heads
from .dense.linear import PackedLinear, gelu_kind, row_dtype
from .grouped.linear import LinearGrouped
from .grouped.weight import GroupedWeight
from .layer import EncoderLayer, FeedForward, RowNorm
from .lowrank.attention import LowRankAttention
from .lowrank.factors import Factors, GroupedFactors
from .lowrank.feed_forward import FeedForwardLowRank
from .lowrank.grouped import LinearLowRankGrouped
from .lowrank.linear import LinearLowRank, on_gpu
from .parts import LayerParts

__all__ = ["JOINT", "CompressedParts", "build_layer", "dense_layer", "why_not"]

#: the smaller weights of a layer, of few bits or of low rank, by the names of :class:`LayerParts`;
#: factors of query, key and value are one weight, under :data:`JOINT`
CompressedParts = MutableMapping[str, GroupedWeight | Factors | GroupedFactors]
JOINT = "query_key_value"
#: the parts of a layer that each slot is made of
_PARTS = {
    "attention": ("query", "key", "value"), "out": ("out",), "feed_forward": ("up", "down"),
}  # fmt: skip


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


def _head_padding(parts: LayerParts) -> int:
    return -parts.head_dim % ops.head_dims(parts.query.weight.device).step


def why_not(
    parts: LayerParts, plan: LayerPlan, compressed: CompressedParts | None = None
) -> list[str]:
    """Why the slots of ``parts`` cannot be filled as ``plan`` says; empty if they can.

    Args:
        parts: the original modules.
        plan: of the layer.
        compressed: what grouped and low-rank slots are made of, in the place of the weights of
            ``parts``, which are what it stands for.
    """
    reasons = []
    if plan.attention == "binary" and parts.head_dim % 32:
        reasons.append(f"binary attention: got heads of {parts.head_dim}, need a multiple of 32")
    if plan.feed_forward == "binary" and _activation_name(parts) is None:
        reasons.append("binary feed-forward: got another activation, need GELU (erf) or ReLU")
    for slot, names in _PARTS.items():
        if getattr(plan, slot) == "grouped":
            reasons += _why_not_grouped(parts, slot, names, compressed or {})
        elif getattr(plan, slot) == "lowrank":
            reasons += _why_not_lowrank(parts, slot, names, compressed or {})
    return reasons


def _why_not_lowrank(
    parts: LayerParts, slot: str, names: Sequence[str], compressed: CompressedParts
) -> list[str]:
    of = [getattr(parts, name).weight.detach() for name in names]
    if slot != "feed_forward" and _head_padding(parts):
        step = ops.head_dims(of[0].device).step
        return [f"low-rank {slot}: got heads of {parts.head_dim}, need a multiple of {step} here"]
    reasons = []
    wanted = {JOINT: torch.cat(of)} if slot == "attention" else dict(zip(names, of, strict=True))
    for name, weight in wanted.items():
        factors = compressed.get(name)
        if not isinstance(factors, Factors | GroupedFactors):
            reasons.append(f"low-rank {slot}: no factors of {name}; try filbert.factorize")
        elif not _near(factors, weight):
            reasons.append(
                f"low-rank {slot}: the weight of {name} is not the product of its factors; try "
                "filbert.factorize again"
            )
    return reasons


def _near(factors: Factors | GroupedFactors, weight: Tensor) -> bool:
    """Whether ``weight`` is the factors' product, rounded as it may have been."""
    if isinstance(factors, Factors):
        product = Factors(factors.a.float(), factors.b.float()).weight
        coarse = max(torch.finfo(t.dtype).eps for t in (factors.a, weight))
    else:
        product, coarse = factors.weight, torch.finfo(weight.dtype).eps
    if product.shape != weight.shape:
        return False
    return float((product - weight.float()).norm()) <= 4 * coarse * float(product.norm())


def _why_not_grouped(
    parts: LayerParts, slot: str, names: Sequence[str], compressed: CompressedParts
) -> list[str]:
    quantized = {n: w for n, w in compressed.items() if isinstance(w, GroupedWeight)}
    if missing := [name for name in names if name not in quantized]:
        return [f"grouped {slot}: no quantized {', '.join(missing)}; try filbert.quantize"]
    if slot != "feed_forward" and _head_padding(parts):
        step = ops.head_dims(parts.query.weight.device).step
        return [f"grouped {slot}: got heads of {parts.head_dim}, need a multiple of {step} here"]
    reasons = []
    first, *others = (quantized[name] for name in names)
    if slot == "attention" and not all(first.like(other) for other in others):
        bits = ", ".join(str(quantized[name].bits) for name in names)
        reasons.append(f"grouped {slot}: got {bits} bits, need the same for query, key and value")
    for name in names:
        weight = getattr(parts, name).weight.detach()
        if not _same_numbers(quantized[name].to(weight.device), weight):
            reasons.append(
                f"grouped {slot}: the weight of {name} is not what was quantized; try "
                "filbert.quantize again"
            )
    return reasons


def _same_numbers(quantized: GroupedWeight, weight: Tensor) -> bool:
    """Whether ``weight`` is what the codes stand for, perhaps after a cast to 16 bits and back."""
    numbers = quantized.dequantize()
    casts = dict.fromkeys((weight.dtype, torch.float16, torch.bfloat16))
    return any(torch.equal(numbers.to(cast).to(weight.dtype), weight) for cast in casts)


class _Builder:
    """Makes the modules of one layer."""

    def __init__(
        self,
        parts: LayerParts,
        compressed: CompressedParts | None,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.parts = parts
        self.compressed: CompressedParts = {} if compressed is None else compressed
        weight = parts.query.weight
        self.weight_dtype, self.device = weight.dtype, weight.device
        self.dtype = compute_dtype or row_dtype(weight.dtype, weight.device)
        self.padding = _head_padding(parts)

    def padded(self, t: Tensor, dim: int = 0) -> Tensor:
        return pad_heads(t, dim, self.parts.num_heads, self.padding)

    def dense(
        self, names: Sequence[str], bias: Tensor | None, activation: str | None = None
    ) -> PackedLinear:
        weights = [getattr(self.parts, name).weight for name in names]
        if names == ["out"]:
            weights = [self.padded(weights[0], 1)]
        elif names[0] in _PARTS["attention"]:
            weights = [self.padded(weight) for weight in weights]
        return PackedLinear(weights, bias, activation=activation, compute_dtype=self.dtype)

    def grouped(
        self, names: Sequence[str], bias: Tensor | None, activation: str | None = None
    ) -> LinearGrouped:
        held = [self.compressed[name] for name in names]
        whole = [weight.to(self.device) for weight in held if isinstance(weight, GroupedWeight)]
        made = LinearGrouped(
            whole, bias, activation=activation, compute_dtype=self.dtype,
            weight_dtype=self.weight_dtype,
        )  # fmt: skip
        # Weights exist once: those of several in one are views of it.
        self.compressed.update(zip(names, made.weight.split(made.sizes), strict=True))
        return made

    def lowrank(
        self, names: Sequence[str], bias: Tensor | None, activation: str | None = None
    ) -> LinearLowRank | LinearLowRankGrouped:
        joint = names[0] in _PARTS["attention"]
        factors = self.compressed[JOINT if joint else names[0]]
        assert not isinstance(factors, GroupedWeight)
        sizes = [getattr(self.parts, name).out_features for name in names]
        if joint and len(names) < len(_PARTS["attention"]):  # some rows of what all three share
            whole = [getattr(self.parts, name).out_features for name in _PARTS["attention"]]
            first = sum(whole[: _PARTS["attention"].index(names[0])])
            assert isinstance(factors, Factors)
            factors = Factors(factors.a, factors.b[first : first + sum(sizes)])
        if isinstance(factors, Factors):
            return LinearLowRank(
                factors, bias, activation=activation, sizes=sizes, compute_dtype=self.dtype
            )
        return LinearLowRankGrouped(
            factors, bias, activation=activation, sizes=sizes, compute_dtype=self.dtype,
            weight_dtype=self.weight_dtype,
        )  # fmt: skip

    def linear(self, kind: str) -> Callable[..., Any]:
        """What makes a linear module for rows of numbers."""
        return {"dense": self.dense, "grouped": self.grouped, "lowrank": self.lowrank}[kind]

    def bits(self, name: str) -> LinearBinary:
        return LinearBinary.from_linear(getattr(self.parts, name))

    # --- the slots ---

    def biases(self, fold: bool) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """The biases of query, key and value, and of out."""
        own: dict[str, Tensor | None] = {
            name: getattr(self.parts, name).bias for name in _PARTS["attention"]
        }
        bias: Tensor | None = self.parts.out.bias
        if fold:
            # softmax_j(q·(k_j + b_k)) is softmax_j(q·k_j), and sum_j p_j (v_j + b_v) is
            # sum_j p_j v_j + b_v because the weights sum to 1.
            if (value := own["value"]) is not None:
                folded = self.parts.out.weight.double() @ value.double()
                bias = folded if bias is None else bias.double() + folded
            own["key"] = own["value"] = None
        return own, bias

    def attention(
        self, kind: str, biases: dict[str, Tensor | None], split_query: bool, out: Any
    ) -> Any:
        if kind == "binary":
            sides = [self.bits(name) for name in _PARTS["attention"]]
            return BinaryAttention(sides, self.parts.num_heads, out.packer)

        def projection(names: list[str]) -> Any:
            bias = None
            if any(biases[name] is not None for name in names):
                bias = torch.cat([self._bias_of(name, biases[name]) for name in names])
            return self.linear(kind)(names, bias)

        all_of = list(_PARTS["attention"])
        whole = self.parts.head_dim % ops.PANEL == 0 and not on_gpu(self.device)
        if whole and kind == "lowrank" and isinstance(self.compressed[JOINT], Factors):
            return LowRankAttention(
                projection(all_of), self.parts.num_heads, self.parts.scale,
                splits_query=split_query,
            )  # fmt: skip
        # Two layers would hold the first factor twice.
        split_query = split_query and not isinstance(self.compressed.get(JOINT), GroupedFactors)
        split = [all_of[:1], all_of[1:]] if split_query else [all_of]
        return DenseAttention(
            [projection(names) for names in split], self.parts.num_heads, self.parts.scale,
            head_padding=self.padding,
        )  # fmt: skip

    def _bias_of(self, name: str, bias: Tensor | None) -> Tensor:
        module: nn.Linear = getattr(self.parts, name)
        none = module.weight.new_zeros(module.out_features)
        return self.padded(none if bias is None else bias.detach())

    def feed_forward(self, kind: str) -> Any:
        if kind == "binary":
            name = _activation_name(self.parts) or "gelu"
            return BinaryFeedForward(self.bits("up"), self.bits("down"), name)
        gelu = gelu_kind(self.parts.activation)
        up = self.linear(kind)(["up"], self.parts.up.bias, gelu)
        down = self.linear(kind)(["down"], self.parts.down.bias)
        if gelu and isinstance(up, LinearLowRank) and isinstance(down, LinearLowRank):
            return FeedForwardLowRank(up, down)
        # Any other activation is the model's own function, run on the GEMM's result.
        return FeedForward(up, down, None if gelu else self.parts.activation)


def build_layer(
    parts: LayerParts,
    plan: LayerPlan,
    *,
    compressed: CompressedParts | None = None,
    compute_dtype: torch.dtype | None = None,
    fold_bias: bool = True,
    split_query: bool = False,
) -> EncoderLayer:
    """The layer of ``parts`` that ``plan`` describes.

    Dense and grouped slots: QKV GEMM, attention per sequence, output GEMM, feed-forward GEMMs, each
    with what follows it fused where the GEMM can. Binary slots are BiBERT's: centred signs of
    latent weights with a scale for each row, signs of rows, and -1 for a number that is 0. Low-rank
    slots multiply by two factors in the place of each weight, a feed-forward part in one pass.

    Args:
        parts: the original modules. They are read, not kept.
        plan: what :func:`why_not` has nothing against.
        compressed: the weights of grouped and low-rank slots. Quantized ones that become one are
            replaced by views of it.
        compute_dtype: dtype of the rows, float32 or bfloat16, on CUDA also float16;
            :func:`~filbert.nn.dense.linear.row_dtype` if not given.
        fold_bias: see :class:`filbert.plan.PackedEncoderConfig`.
        split_query: keep the query weight apart from key and value, so that the layer can compute
            first rows alone.

    Paper: ByteTransformer, arXiv 2210.03052; BiBERT, arXiv 2203.06390; Q-BERT, arXiv 1909.05840;
    FlashSVD, arXiv 2508.01506.
    """
    make = _Builder(parts, compressed, compute_dtype)
    with torch.no_grad():
        # Folded into one of bits a bias would be one of floats.
        biases, out_bias = make.biases(fold_bias and plan.out != "binary")
        out = make.bits("out") if plan.out == "binary" else make.linear(plan.out)(["out"], out_bias)
        layer = EncoderLayer(
            make.attention(plan.attention, biases, split_query, out),
            out,
            RowNorm.of(parts.attn_norm, make.dtype),
            make.feed_forward(plan.feed_forward),
            RowNorm.of(parts.ffn_norm, make.dtype),
        )
    for _, linear in layer.linears():
        linear.trainable = False  # the encoder asks, once a call and for flags of now
    return layer


def dense_layer(
    parts: LayerParts,
    *,
    compute_dtype: torch.dtype | None = None,
    fold_bias: bool = True,
    split_query: bool = False,
) -> EncoderLayer:
    """A layer whose slots are dense; arguments as of :func:`build_layer`."""
    return build_layer(
        parts, LayerPlan(), compute_dtype=compute_dtype, fold_bias=fold_bias,
        split_query=split_query,
    )  # fmt: skip
