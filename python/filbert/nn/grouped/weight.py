"""A weight of a few bits: codes, and what they stand for.

Paper: Q-BERT, arXiv 1909.05840.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops._linear_grouped import unpack_groups

__all__ = ["GroupedWeight"]


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """The numbers ``scale[n] * multiplier[n, g] * (code[n, k] - zero[n, g])``, ``g`` the group of
    input ``k``, in the layout that :func:`filbert.linear_grouped` computes with on every device.

    A group along the outputs, as Q-BERT has them, is ``scale`` repeated for its outputs.

    Attributes:
        packed: uint8 ``[ceil(N/16), ceil(K/32), 64 * bits]``, see :func:`filbert.ops.pack_grouped`.
        bits: 2, 3, 4, 6 or 8.
        outputs: N.
        inputs: K.
        scale: float32 ``[N]``.
        multiplier: uint8 ``[ceil(N/16), G, 16]``, see :func:`filbert.ops.pack_groups`; or None
            for 1.
        zero: uint8, likewise: the code that stands for 0; or None for ``2**(bits - 1)``.
    """

    packed: Tensor
    bits: int
    outputs: int
    inputs: int
    scale: Tensor
    multiplier: Tensor | None = None
    zero: Tensor | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        bits: int,
        scale: Tensor,
        multiplier: Tensor | None = None,
        zero: Tensor | None = None,
    ) -> GroupedWeight:
        """From plain tensors.

        Args:
            codes: uint8 ``[N, K]`` from 0 to ``2**bits - 1``.
            bits: 2, 3, 4, 6 or 8.
            scale: float32 ``[N]``, finite.
            multiplier: uint8 ``[N, G]`` of groups of ``K / G`` inputs, or None.
            zero: uint8 ``[N, G]`` from 0 to ``2**bits - 1``, or None.

        Raises:
            ValueError: shapes, dtypes or numbers that do not fit, or an output whose sums could
                exceed int32.
        """
        outputs, inputs = codes.shape
        if scale.shape != (outputs,) or not bool(scale.isfinite().all()):
            raise ValueError(
                f"scale: got {tuple(scale.shape)}, need [{outputs}] finite floats, one for each "
                "output"
            )
        for name, t in (("multiplier", multiplier), ("zero", zero)):
            if t is not None:
                check_groups(name, t, outputs, inputs)
        if zero is not None and int(zero.max()) >> bits:
            raise ValueError(f"zero: got {int(zero.max())}, need less than 2**{bits}")
        packed = ops.pack_grouped(codes, bits)
        ops.grouped_totals(codes, bits, multiplier, zero)  # no sum of it can exceed int32
        return cls(
            packed, bits, outputs, inputs, scale.detach().float().contiguous(),
            None if multiplier is None else ops.pack_groups(multiplier),
            None if zero is None else ops.pack_groups(zero),
        )  # fmt: skip

    @property
    def groups(self) -> int:
        """G, the groups along the inputs."""
        return max([1] + [t.shape[1] for t in (self.multiplier, self.zero) if t is not None])

    def codes(self) -> Tensor:
        """uint8 ``[N, K]``."""
        return ops.unpack_grouped(self.packed, self.bits, self.outputs, self.inputs)

    def plain(self, name: str) -> Tensor | None:
        """``multiplier`` or ``zero`` as uint8 ``[N, G]``, or None."""
        packed: Tensor | None = getattr(self, name)
        return None if packed is None else unpack_groups(packed, self.outputs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[N, K]`` numbers. Products of integers are exact, and rounded once."""
        numbers = self.codes().float().unflatten(1, (self.groups, -1))
        zero, multiplier = self.plain("zero"), self.plain("multiplier")
        numbers -= float(1 << (self.bits - 1)) if zero is None else zero.float().unsqueeze(-1)
        if multiplier is not None:
            numbers *= multiplier.float().unsqueeze(-1)
        return (numbers.flatten(1) * self.scale[:, None]).to(dtype)

    def totals(self) -> Tensor:
        """See :func:`filbert.ops.grouped_totals`."""
        return ops.grouped_totals(
            self.codes(), self.bits, self.plain("multiplier"), self.plain("zero")
        )

    def offset(self) -> Tensor | None:
        """See :func:`filbert.ops.grouped_offsets`; None where there is no zero."""
        zero = self.plain("zero")
        if zero is None:
            return None
        return ops.grouped_offsets(zero, self.bits, self.plain("multiplier"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by the names of the attributes."""
        held = {"packed": self.packed, "scale": self.scale, "multiplier": self.multiplier,
                "zero": self.zero}  # fmt: skip
        return {name: t for name, t in held.items() if t is not None}

    def to(self, device: torch.device | str) -> GroupedWeight:
        """The same weight on another device; itself where it is there."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def like(self, other: GroupedWeight) -> bool:
        """Whether the two can be one weight over the same inputs."""

        def form(w: GroupedWeight) -> tuple[Any, ...]:
            return w.bits, w.inputs, w.groups, w.multiplier is None, w.zero is None

        return form(self) == form(other)

    @classmethod
    def cat(cls, weights: Sequence[GroupedWeight]) -> GroupedWeight:
        """One weight with the outputs of several over the same inputs, one after the other.

        Raises:
            ValueError: other bits, inputs or groups.
        """
        first = weights[0]
        if len(weights) == 1:
            return first
        if not all(first.like(other) for other in weights):
            got = ", ".join(f"{w.bits} bits of {w.inputs} in {w.groups} groups" for w in weights)
            raise ValueError(f"weights over one input: got {got}; need the same for all")
        scale = torch.cat([w.scale for w in weights])
        if all(w.outputs % ops.PANEL == 0 for w in weights):
            parts: dict[str, Any] = {
                name: torch.cat([getattr(w, name) for w in weights])
                for name in ("packed", "multiplier", "zero")
                if getattr(first, name) is not None
            }
            return replace(first, outputs=scale.shape[0], scale=scale, **parts)

        def plain(name: str) -> Tensor | None:
            found = [t for w in weights if (t := w.plain(name)) is not None]
            return torch.cat(found) if found else None

        codes = torch.cat([w.codes() for w in weights])
        return cls.from_codes(codes, first.bits, scale, plain("multiplier"), plain("zero"))

    def split(self, sizes: Sequence[int]) -> list[GroupedWeight]:
        """The parts of so many outputs, as views where panels allow it."""
        parts, begin = [], 0
        for size in sizes:
            end = begin + size
            if begin % ops.PANEL == 0 and (size % ops.PANEL == 0 or end == self.outputs):
                panels = slice(begin // ops.PANEL, -(-end // ops.PANEL))
                views: dict[str, Any] = {
                    name: t[panels]
                    for name in ("packed", "multiplier", "zero")
                    if (t := getattr(self, name)) is not None
                }
                part = replace(self, outputs=size, scale=self.scale[begin:end], **views)
            else:
                plain = [self.plain(name) for name in ("multiplier", "zero")]
                multiplier, zero = (None if t is None else t[begin:end] for t in plain)
                part = GroupedWeight.from_codes(
                    self.codes()[begin:end], self.bits, self.scale[begin:end], multiplier, zero
                )
            parts.append(part)
            begin = end
        return parts


def check_groups(name: str, t: Tensor, outputs: int, inputs: int) -> None:
    """Raises ValueError unless ``t`` is uint8 ``[N, G]`` of groups that the kernels have."""
    groups = t.shape[1] if t.ndim == 2 else 0
    size = inputs // groups if groups and inputs % groups == 0 else 0
    whole = groups == 1 or size in ops.GROUP_SIZES
    if t.shape != (outputs, groups) or t.dtype != torch.uint8 or not size or not whole:
        raise ValueError(
            f"{name}: got {tuple(t.shape)} {t.dtype} for {outputs} outputs of {inputs} inputs, "
            f"need uint8 [{outputs}, G] of a whole number of groups, each "
            f"{', '.join(map(str, ops.GROUP_SIZES))} or all inputs"
        )
