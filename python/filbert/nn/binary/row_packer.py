"""How rows of numbers become bits, or few-bit codes, before a binary linear layer.

Paper: BiBERT, arXiv 2203.06390 (sign); BiT, arXiv 2205.13016 (elastic); BinaryBERT, arXiv
2012.15701 (uniform).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...packed.bits import PackedBits
from ..inference import check_no_gradient
from .thresholds import threshold_of

__all__ = ["RowPacker"]

#: learned scales count as at least this much, as in BiT, so that none divides by zero or turns a
#: sign round
SCALE_FLOOR = 1e-5
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_of(what: str, got: object, allowed: tuple[object, ...]) -> None:
    """Raises a ValueError unless ``got`` is one of ``allowed``."""
    if got not in allowed:
        need = ", ".join(map(repr, allowed))
        raise ValueError(f"{what}: got {got!r}, need one of {need}; try {allowed[0]!r}")


class RowPacker(nn.Module):
    """Packs float rows ``[T, features]`` to :class:`filbert.PackedBits`.

    - ``bits=1, signed=True``: ±1, by which side of ``threshold`` a number lies on.
    - ``bits=1, signed=False``: {0, 1}, 1 from ``threshold`` on.
    - ``bits`` 2, 4 or 8: codes by uniform quantisation with one static ``scale``, or, without it,
      with a scale for each row. Neither depends on other rows, as a minimum and maximum over the
      whole batch would.

    Args:
        features: elements of a row.
        bits: 1, 2, 4 or 8.
        signed: see above; with more bits, whether codes may be negative.
        ties: with ``bits=1`` and signs, what a number at its threshold becomes: -1 (``"below"``),
            +1 (``"above"``), or 0 (``"exact"``: two planes, ``torch.sign``).
        threshold: whether there is one for each channel; else it is 0.
        static: with more bits, whether there is a static scale.
        clip: with more bits, magnitudes are cut to this first, or None.

    Attributes:
        threshold: float32 ``[features]`` or None.
        scale: float32 ``[]`` or None.

    Raises:
        ValueError: arguments that contradict each other.
    """

    threshold: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        features: int,
        *,
        bits: int = 1,
        signed: bool = True,
        ties: str = "below",
        threshold: bool = False,
        static: bool = False,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        one_of("bits", bits, (1, 2, 4, 8))
        one_of("ties", ties, ("below", "above", "exact"))
        if bits == 1 and (static or clip is not None):
            raise ValueError(
                "bits: got 1 with a scale or clip, need 2, 4 or 8 for these; try folding the scale "
                "of one-bit inputs into alpha"
            )
        if bits > 1 and threshold:
            raise ValueError(f"threshold: got one with {bits} bits, need bits=1")
        self.features, self.bits, self.signed, self.ties = features, bits, signed, ties
        self.clip = clip
        self.register_buffer("threshold", torch.zeros(features) if threshold else None)
        self.register_buffer("scale", torch.ones(()) if static else None)

    @classmethod
    def sign(cls, features: int, shift: Tensor | None = None, ties: str = "below") -> RowPacker:
        """``sign(x + shift)``, float32 ``shift`` ``[features]``: ``x + b`` is above 0 exactly where
        x is above -b, since float32 addition gives 0 for opposite numbers only."""
        packer = cls(features, ties=ties, threshold=shift is not None)
        if shift is not None:
            packer.threshold = -shift.detach().float()
        return packer

    @classmethod
    def elastic(cls, features: int, scale: float, shift: Tensor | None = None) -> RowPacker:
        """``clamp(round((x + shift) / scale), 0, 1)``, BiT's {0, 1} after a ReLU. Rounding is half
        to even, so the bit is 1 where the quotient is above 1/2."""
        a = torch.tensor(max(scale, SCALE_FLOOR), dtype=torch.float32)
        b = torch.zeros(features) if shift is None else shift.detach().float()
        packer = cls(features, signed=False, ties="above", threshold=True)
        packer.threshold = threshold_of(
            lambda x: ((x + b) / a.to(b.device)).round() >= 1, features, b.device
        )
        return packer

    @classmethod
    def uniform(
        cls,
        features: int,
        bits: int,
        *,
        signed: bool = True,
        scale: float | None = None,
        clip: float | None = None,
    ) -> RowPacker:
        """Codes of 2, 4 or 8 bits, with a static ``scale`` or one for each row."""
        packer = cls(features, bits=bits, signed=signed, static=scale is not None, clip=clip)
        if scale is not None:
            packer.scale = torch.tensor(max(scale, SCALE_FLOOR), dtype=torch.float32)
        return packer

    @property
    def low(self) -> int:
        """The integer of code 0."""
        if self.bits == 1:
            return -1 if self.signed else 0
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def step(self) -> int:
        """How far codes lie apart."""
        return 2 if self.bits == 1 and self.signed and self.ties != "exact" else 1

    @property
    def reach(self) -> int:
        """The largest magnitude of an element, as an integer."""
        return 1 if self.bits == 1 else 2 ** (self.bits - 1) if self.signed else 2**self.bits - 1

    def same_as(self, other: RowPacker) -> bool:
        """Whether both pack every row alike, so that one packed row can serve two layers."""
        tensors = ((self.threshold, other.threshold), (self.scale, other.scale))
        return self.config() == other.config() and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in tensors
        )

    def conditions(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What a bit means, as conditions on numbers ``[features]``: ``above``, for the code or the
        upper code, and with ``ties="exact"`` also ``at``, for the lower one."""
        t = 0.0 if self.threshold is None else self.threshold
        if self.ties == "below":
            return {"above": lambda x: x > t}
        if self.ties == "above":
            return {"above": lambda x: x >= t}
        return {"above": lambda x: x > t, "at": lambda x: x >= t}

    def forward(self, x: Tensor) -> PackedBits:
        """Packs rows ``[T, features]`` of float32 or bfloat16, on CUDA also float16.

        Raises:
            ValueError: another shape or dtype.
            RuntimeError: a gradient is asked for.
        """
        if x.ndim != 2 or x.shape[1] != self.features or x.dtype not in _DTYPES:
            raise ValueError(
                f"rows: got {x.dtype} {tuple(x.shape)}, need float rows [T, {self.features}]; "
                "try x.flatten(0, -2).float()"
            )
        check_no_gradient("RowPacker", rows=x)
        x = x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()
        if self.bits == 1:
            make = PackedBits.signs if self.signed else PackedBits.bits
            return make(x, self.threshold, self.ties)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        return PackedBits.codes(x, self.bits, self.low, self._scale_of(x))

    def _scale_of(self, x: Tensor) -> Tensor | None:
        """The scale of each row, or None for the operator's own rule."""
        if self.scale is not None:
            return self.scale.expand(x.shape[0]).contiguous()
        if self.signed:
            return None
        # What is negative becomes 0, so only what is positive sets the scale.
        return x.float().clamp(min=0).amax(1) / (2**self.bits - 1)

    def config(self) -> dict[str, Any]:
        """What the constructor needs to make an equal module with tensors yet to be loaded."""
        return {
            "features": self.features,
            "bits": self.bits,
            "signed": self.signed,
            "ties": self.ties,
            "threshold": self.threshold is not None,
            "static": self.scale is not None,
            "clip": self.clip,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RowPacker:
        """The inverse of :meth:`config`."""
        return cls(**config)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return ", ".join(f"{key}={value}" for key, value in self.config().items())
