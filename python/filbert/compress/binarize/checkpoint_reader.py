"""Takes entries out of a state dict, and says of each that is unfit why it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...nn.binary.linear import SCHEMES
from .checkpoint_checks import clean
from .latent import LatentLinear, Linears
from .quantizers import SCALE_FLOOR

__all__ = ["Reader"]


class Reader:
    """Takes entries out of the state dict of a model of class ``kind``; collects what is wrong."""

    def __init__(
        self, entries: Mapping[str, Tensor], options: Mapping[str, Any], kind: str
    ) -> None:
        self.entries = {clean(name): value for name, value in entries.items()}
        self.options, self.kind = options, kind
        self.reasons: list[str] = []
        self.used: set[str] = set()
        self.clipped = False
        self.uncalibrated: list[str] = []

    def take(self, name: str, ndim: int) -> Tensor:
        t = self.maybe(name, ndim)
        if name not in self.entries:
            self.reasons.append(f"{name}: got nothing, need a tensor of {ndim} dimensions")
        return torch.zeros([1] * ndim) if t is None else t

    def maybe(self, name: str, ndim: int | None = None) -> Tensor | None:
        """An entry of ``ndim`` dimensions, if given; None if it is not there or unfit."""
        self.used.add(name)
        t = self.entries.get(name)
        if t is None:
            return None
        got = f"{t.dtype} {tuple(t.shape)}"
        if not t.is_floating_point() or (ndim is not None and t.ndim != ndim):
            need = "floats" if ndim is None else f"floats of {ndim} dimensions"
            self.reasons.append(f"{name}: got {got}, need {need}")
        elif ndim is not None and (odd := int((~t.isfinite()).sum())):
            self.reasons.append(f"{name}: got {odd} infinite or NaN values, need finite floats")
        else:
            return t.detach().float().cpu()
        return None

    def scale(self, name: str) -> tuple[float | None, float | None]:
        """A learned scale, and a clip: entries of one element are the first, of two the second."""
        t = self.maybe(name)
        if t is None:
            return None, None
        if t.numel() == 2 and bool(t.isfinite().all()):
            self.clipped = True
            return None, float(t.abs().max())
        value = float(t.flatten()[0]) if t.numel() == 1 else math.nan
        if self.options["published"] and value == 1.0:
            self.uncalibrated.append(name)
        elif self.options["scheme"] == "binarybert" and value < SCALE_FLOOR:
            self.reasons.append(
                f"{name}: got {value:g}, need a step of at least {SCALE_FLOOR:g}; try calibrating "
                "the model with a first batch"
            )
        if not math.isfinite(value):
            got = value if t.numel() == 1 else tuple(t.shape)
            self.reasons.append(
                f"{name}: got {got}, need one finite scale; try calibrating the model with a first "
                "batch"
            )
        return value, None

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self.take(f"{name}.weight", 1), self.take(f"{name}.bias", 1)

    def linear(self, name: str, signed: bool = True) -> Linears:
        return tuple(self._linear(part, signed) for part in self._names(name))

    def _names(self, name: str) -> list[str]:
        """Of an entry's parts: itself, or its two halves."""
        if f"{name}.weight" in self.entries or f"{name}_1.weight" not in self.entries:
            return [name]
        if self.options["scheme"] != "binarybert":
            self.reasons.append(
                f"{name}_1.weight: got a split layer, need an unsplit one; only 'binarybert' has "
                "halves that are added"
            )
        return [f"{name}_1", f"{name}_2"]

    def _linear(self, name: str, signed: bool) -> LatentLinear:
        options = self.options
        weight = self.take(f"{name}.weight", 2)
        if (values := _values_of_rows(weight)) in (2, 3):
            self.reasons.append(
                f"{name}.weight: got {values} different values in a row, need latent floats: signs "
                "saved by themselves have lost scales and means; try the checkpoint that was saved "
                "with its floating-point weights (--save_fp_model)"
            )
        scale = clip = shift = None
        bits = 1
        if options["scheme"] == "bit":
            scale, _ = self.scale(f"{name}.input_clip_val")
            shift = self.maybe(f"{name}.move.bias", 1)
            if f"{name}.input_clip_val" not in self.entries:
                self.reasons.append(f"{name}.input_clip_val: got nothing, need BiT's scale")
        elif options["scheme"] == "binarybert":
            bits = options["bits"]
            if not options["rows"]:
                scale, clip = self.scale(f"{name}.input_clip_val")
            if clip is not None:
                scale = clip / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
        centre, own = SCHEMES[options["scheme"]]
        granularity = options["granularity"] or own
        bias = self.maybe(f"{name}.bias", 1)
        for what, t, size in (("bias", bias, 0), ("move.bias", shift, 1)):
            if t is not None and t.shape != weight.shape[size : size + 1]:
                need = weight.shape[size]
                self.reasons.append(f"{name}.{what}: got {tuple(t.shape)}, need [{need}]")
        return LatentLinear(
            name, weight, bias, centre, granularity, bits, signed, scale, shift, clip
        )

    def table(self, name: str) -> tuple[Tensor, ...]:
        return tuple(self.take(f"{part}.weight", 2) for part in self._names(name))


def _values_of_rows(weight: Tensor) -> int:
    """The most different values that some rows of ``weight`` have; 0 for rows too short to tell."""
    if weight.shape[1] < 16:
        return 0
    rows = weight[:: max(1, weight.shape[0] // 8)]
    return max((row.unique().numel() for row in rows), default=0)
