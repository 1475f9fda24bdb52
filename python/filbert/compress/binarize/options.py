"""The choices that decide how a binarized module quantizes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from .quantizers import (
    SCHEMES,
    ElasticBinarizer,
    Scaled,
    SignQuantizer,
    UniformQuantizer,
    one_of,
)

__all__ = ["QuantizerOptions", "no_scale", "options_of"]


class QuantizerOptions(NamedTuple):
    """What decides how a module quantizes.

    Attributes:
        scheme: ``"bibert"``, ``"bit"`` or ``"binarybert"``.
        ties: what a sign makes of 0, ``"zero"`` (``torch.sign``, the papers' reference),
            ``"below"`` or ``"above"``, in weights and activations. Only the last two fit in a bit:
            a packed model has the bits of its eager one where both use the same of these. (Row
            sums of LayerNorms and softmaxes are rounded in another order; a number that lies
            within that rounding of a threshold may go to either side.)
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


def no_scale(quantizer: nn.Module, *names: str) -> tuple[str, ...]:
    """``names`` if ``quantizer`` learns no scale that such entries could be."""
    return () if isinstance(quantizer, Scaled) and quantizer.learned else names


def options_of(options: QuantizerOptions | None, scheme: str) -> QuantizerOptions:
    """``options``, or the scheme's own if there are none.

    Raises:
        ValueError: an unknown scheme, or options that contradict it.
    """
    one_of("scheme", scheme, SCHEMES)
    if options is None:
        return QuantizerOptions(scheme, bits=8 if scheme == "binarybert" else 1)
    if options.scheme != scheme:
        raise ValueError(
            f"options: got {options.scheme!r} for a {scheme!r} module, need one scheme; try "
            f"options._replace(scheme={scheme!r})"
        )
    allowed = (2, 4, 8) if scheme == "binarybert" else (1,)
    one_of(f"bits of an activation with {scheme!r}", options.bits, allowed)
    one_of("score_ties", options.score_ties, ("below", "above"))
    return options
