"""Linear layers with one-bit weights: floats or bits in, floats or bits out.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.shared.words import tiles_to_weight, words_for
from ...packed.bits import PackedBits
from ..inference import check_no_gradient
from .dot_packer import DotPacker
from .row_packer import SCALE_FLOOR, RowPacker, one_of
from .traits import OneBitLinear
from .weight import weight_signs, weight_tiles

__all__ = ["LinearBinary", "weight_signs", "weight_tiles"]

#: outputs that lie side by side in the weight
TILE = 16
#: scheme -> (what is subtracted before the sign, what alpha is the mean magnitude of)
SCHEMES = {"bibert": ("row", "row"), "bit": ("tensor", "tensor"), "binarybert": ("none", "row")}


class LinearBinary(OneBitLinear, nn.Module):
    """``y = x @ (alpha * (±1)).T + bias`` by AND and popcount, see :func:`filbert.linear_binary`.

    Float rows are packed by :attr:`packer` on the way in; :class:`filbert.PackedBits` of another
    module go in as they are. A scale that all inputs share (BiT's) is part of alpha. Made by
    :meth:`from_linear`, :meth:`from_weight` or :meth:`from_bits`; for inference only.

    Attributes:
        weight: int32 tiles, see :func:`weight_tiles`.
        totals: int32 ``[N]``, derived from ``weight`` and no part of the state dict.
        alpha: float32 ``[N]``, never negative: rows with a negative one have their bits flipped.
        bias: float32 ``[N]`` or None.
        packer: how float rows become bits.
        weight_ties: weights whose sign is not the reference's, see :func:`weight_signs`.
    """

    weight: Tensor
    totals: Tensor
    alpha: Tensor
    bias: Tensor | None

    def __init__(self, packer: RowPacker, out_features: int, bias: bool = True) -> None:
        """An empty layer, whose tensors are to be loaded."""
        super().__init__()
        self.in_features, self.out_features = packer.features, out_features
        self.packer = packer
        self.weight_ties = 0
        shape = (-(-out_features // TILE), words_for(packer.features), TILE)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("alpha", torch.zeros(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        totals = torch.full((out_features,), -packer.features, dtype=torch.int32)
        self.register_buffer("totals", totals, persistent=False)
        self.register_load_state_dict_post_hook(_derive_after_load)

    @classmethod
    def from_bits(
        cls,
        bits: Tensor,
        alpha: Tensor,
        bias: Tensor | None = None,
        packer: RowPacker | None = None,
    ) -> LinearBinary:
        """From weight bits ``[N, K]``, ``alpha`` ``[N]`` of any sign, and ``bias`` ``[N]`` or None.

        Raises:
            ValueError: shapes that do not fit, or an alpha or bias that is not finite.
        """
        for name, t in (("alpha", alpha), ("bias", bias)):
            if t is not None and (t.shape != bits.shape[:1] or not bool(t.isfinite().all())):
                raise ValueError(
                    f"{name}: got {tuple(t.shape)}, need [{bits.shape[0]}] finite floats, one for "
                    "each row of bits"
                )
        packer = RowPacker.sign(bits.shape[1]) if packer is None else packer
        if packer.features != bits.shape[1]:
            raise ValueError(f"packer: got {packer.features} features, need {bits.shape[1]}")
        layer = cls(packer, bits.shape[0], bias is not None)
        alpha = alpha.detach().float()
        bits = bits.bool() ^ (alpha < 0)[:, None]
        layer.weight, layer.totals = weight_tiles(bits)
        layer.alpha = alpha.abs()
        if bias is not None:
            layer.bias = bias.detach().float().clone()
        return layer

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        packer: RowPacker,
        *,
        centre: str,
        granularity: str,
        input_scale: float | Tensor = 1.0,
        weight_ties: str = "zero",
    ) -> LinearBinary:
        """From a latent weight ``[N, K]``, see :func:`weight_signs` for most arguments.

        ``input_scale`` is what the ±1 or {0, 1} inputs are worth; it is multiplied into alpha in
        float32.
        """
        bits, alpha, ties = weight_signs(weight, centre, granularity, weight_ties)
        layer = cls.from_bits(bits, alpha * input_scale, bias, packer)
        layer.weight_ties = ties
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str = "bibert",
        *,
        ties: str = "below",
        input_scale: float | None = None,
        input_shift: Tensor | None = None,
        unsigned: bool = False,
        activation_bits: int | None = None,
        granularity: str | None = None,
        weight_ties: str = "zero",
    ) -> LinearBinary:
        """From the latent weights of a layer that was trained to be binary.

        Args:
            linear: with float weights ``[N, K]``, as they are while training.
            scheme: ``"bibert"``: row-mean centring, a scale for each row, inputs ``sign(x)``.
                ``"bit"``: tensor-mean centring, one scale, inputs ``a * sign(x + b)``, or after a
                ReLU (``unsigned``) ``a * clamp(round((x + b) / a), 0, 1)``. ``"binarybert"``: no
                centring, a scale for each row, inputs of 2, 4 or 8 bits.
            ties: what an input exactly at its threshold becomes, see :class:`RowPacker`.
            input_scale: BiT's ``a``; BinaryBERT's static step, None for one of each row.
            input_shift: BiT's ``b``, ``[K]``.
            unsigned: whether inputs are never negative.
            activation_bits: with ``"binarybert"``, 8 if not given.
            granularity: of alpha, ``"row"`` or ``"tensor"``; the scheme's own if not given.
            weight_ties: see :func:`weight_signs`.

        Raises:
            ValueError: an unknown scheme, or arguments that it does not have.
        """
        one_of("scheme", scheme, tuple(SCHEMES))
        given = {
            "input_scale": (input_scale, ("bit", "binarybert")),
            "input_shift": (input_shift, ("bit",)),
            "unsigned": (unsigned or None, ("bit", "binarybert")),
            "activation_bits": (activation_bits, ("binarybert",)),
        }
        for name, (value, schemes) in given.items():
            if value is not None and scheme not in schemes:
                raise ValueError(f"{name}: got one with {scheme!r}, which has none; need {schemes}")
        features, worth = linear.in_features, 1.0
        if scheme == "binarybert":
            packer = RowPacker.uniform(
                features, activation_bits or 8, signed=not unsigned, scale=input_scale
            )
        else:
            if scheme == "bit":
                worth = max(1.0 if input_scale is None else input_scale, SCALE_FLOOR)
            packer = (
                RowPacker.elastic(features, worth, input_shift)
                if unsigned
                else RowPacker.sign(features, input_shift, ties)
            )
        centre, own = SCHEMES[scheme]
        return cls.from_weight(
            linear.weight, linear.bias, packer, centre=centre, granularity=granularity or own,
            input_scale=worth, weight_ties=weight_ties,
        )  # fmt: skip

    @classmethod
    def concat(cls, layers: Sequence[LinearBinary]) -> LinearBinary:
        """One layer whose outputs are those of several over the same input, one after the other.

        Raises:
            ValueError: layers that pack their input differently, or whose number of outputs is not
                a multiple of 16.
        """
        first = layers[0]
        if not all(first.packer.same_as(other.packer) for other in layers):
            raise ValueError("layers: got different packers, need one input for all")
        if any(layer.out_features % TILE for layer in layers):
            sizes = [layer.out_features for layer in layers]
            raise ValueError(f"layers: got {sizes} outputs, need multiples of {TILE}")
        if len({layer.bias is None for layer in layers}) != 1:
            raise ValueError("layers: some have a bias and some have none, need all or none")
        whole = cls(first.packer, sum(m.out_features for m in layers), first.bias is not None)
        for name in ("weight", "totals", "alpha", "bias"):
            if getattr(whole, name) is not None:
                setattr(whole, name, torch.cat([getattr(layer, name) for layer in layers]))
        whole.weight_ties = sum(layer.weight_ties for layer in layers)
        return whole

    def derive(self) -> None:
        """Makes again what follows from the weight; done by itself after ``load_state_dict``."""
        # Without unpacking: pairs, nibbles and bytes of each word are added up side by side.
        x = self.weight.to(torch.int64) & 0xFFFFFFFF
        x = x - (x >> 1 & 0x55555555)
        x = (x & 0x33333333) + (x >> 2 & 0x33333333)
        ones = ((x + (x >> 4) & 0x0F0F0F0F) * 0x01010101 & 0xFFFFFFFF) >> 24
        ones = ones.sum(1).flatten()[: self.out_features]
        self.totals = (2 * ones - self.in_features).to(torch.int32)

    def weight_bits(self) -> Tensor:
        """The weight as int64 ``[N, K]`` of 0 and 1."""
        return tiles_to_weight(self.weight, self.out_features, self.in_features)

    def pack(self, x: Tensor | PackedBits) -> PackedBits:
        """The input as bits: rows ``[..., K]`` through :attr:`packer`, PackedBits as they are."""
        if isinstance(x, PackedBits):
            if x.features != self.in_features:
                raise ValueError(f"x: got {x.features} features, need {self.in_features}")
            return x
        return self.packer(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))

    def forward(
        self,
        x: Tensor | PackedBits,
        *,
        residual: Tensor | None = None,
        norm: Any = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Numbers out.

        Args:
            x: float rows ``[..., K]``, or packed rows ``[T, K]``.
            residual: ``[..., N]`` in ``dtype``, added to the result, or None.
            norm: LayerNorm over N applied last, ``weight``, ``bias`` and ``eps``, in ``dtype``; or
                None.
            dtype: of the result; that of ``residual``, else of ``x``, else float32.

        Returns:
            ``[..., N]``.

        Raises:
            ValueError: shapes or dtypes that do not fit.
            RuntimeError: a gradient is asked for, or operands on several devices.
        """
        rows = None if residual is None else residual.reshape(-1, self.out_features)
        check_no_gradient(
            "LinearBinary", residual=rows, x=x if isinstance(x, Tensor) else None,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
        )  # fmt: skip
        if dtype is None:
            like = residual if residual is not None else x
            dtype = like.dtype if isinstance(like, Tensor) else torch.float32
        codes = self.pack(x)
        y = ops.linear_binary(
            codes.words, codes.sums, self.weight, self.totals, self.alpha, self.bias, codes.scale,
            step=codes.step, low=codes.low, residual=rows,
            norm_weight=None if norm is None else norm.weight.detach(),
            norm_bias=None if norm is None else norm.bias.detach(),
            eps=0.0 if norm is None else norm.eps, dtype=dtype,
        )  # fmt: skip
        return y if isinstance(x, PackedBits) else y.view(*x.shape[:-1], self.out_features)

    def forward_bits(self, x: Tensor | PackedBits, thresholds: Tensor | DotPacker) -> PackedBits:
        """Bits out, for the next layer; no number of the product is stored.

        Args:
            x: as for :meth:`forward`; packed codes must have no scale.
            thresholds: what :meth:`codes_for` gives; or int32 ``[N]``: +1 where the integer product
                is at least that, else -1.

        Returns:
            Packed rows ``[T, N]``.
        """
        codes = self.pack(x)
        if codes.scale is not None:
            raise ValueError(
                "x: got codes with a scale of each row, need ones without: an integer threshold "
                "cannot know the scale; try forward and the next layer's packer"
            )

        def make(
            threshold: Tensor,
            until: Tensor | None = None,
            lower: Tensor | None = None,
            lower_until: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]:
            return ops.linear_binary_bits(
                codes.words, codes.sums, self.weight, self.totals, threshold,
                step=codes.step, low=codes.low, until=until, lower=lower, lower_until=lower_until,
            )  # fmt: skip

        if isinstance(thresholds, DotPacker):
            return thresholds(make)
        return PackedBits(*make(thresholds), features=self.out_features)

    def value(self, dot: Tensor) -> Tensor:
        """What integers ``[N]`` become as numbers: ``alpha * dot + bias``, rounded twice."""
        y = self.alpha * dot.to(torch.float32)
        return y if self.bias is None else y + self.bias

    def codes_for(self, packer: RowPacker, activation: str | None = None) -> DotPacker:
        """The integer thresholds that give what ``packer`` makes of ``activation`` of the result.

        Args:
            packer: of the next layer; one bit, N features.
            activation: None, ``"relu"`` or ``"gelu"``.
        """
        reach = self.in_features * self.packer.reach
        return DotPacker(self.value, reach, packer, activation, self.alpha.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are held."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def _apply(self, fn: Any, recurse: bool = True) -> LinearBinary:
        # Moves, but never casts: alpha, bias and thresholds are float32 by meaning.
        device = fn(torch.empty(0, device=self.alpha.device)).device
        return super()._apply(lambda t: t.to(device), recurse)

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal layer with tensors yet to be loaded."""
        return {
            "kind": "binary",
            "packer": self.packer.config(),
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearBinary:
        """The inverse of :meth:`config`."""
        packer = RowPacker.from_config(config["packer"])
        return cls(packer, config["out_features"], config["bias"])

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


def _derive_after_load(layer: LinearBinary, _: object) -> None:
    layer.derive()
