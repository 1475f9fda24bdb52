"""The kinds of modules that fill a layer's slots, by the names they have in files.

A new kind adds a line to the tables it has modules for.
"""

from __future__ import annotations

from typing import Any

from .binary.attention import BinaryAttention, MixedAttention
from .binary.feed_forward import BinaryFeedForward
from .binary.linear import LinearBinary
from .binary.linear_sum import LinearBinarySum
from .dense.attention import DenseAttention
from .dense.linear import PackedLinear
from .grouped.linear import LinearGrouped
from .layer import FeedForward
from .lowrank.attention import LowRankAttention
from .lowrank.feed_forward import FeedForwardLowRank
from .lowrank.grouped import LinearLowRankGrouped
from .lowrank.linear import LinearLowRank

__all__ = ["attention_from_config", "feed_forward_from_config", "linear_from_config"]

LINEARS = {
    "binary": LinearBinary, "binary_sum": LinearBinarySum, "dense": PackedLinear,
    "grouped": LinearGrouped, "lowrank": LinearLowRank,
    "lowrank_grouped": LinearLowRankGrouped,
}  # fmt: skip
ATTENTIONS = {
    "binary": BinaryAttention, "dense": DenseAttention, "lowrank": LowRankAttention,
    "mixed": MixedAttention,
}  # fmt: skip
FEED_FORWARDS = {
    "binary": BinaryFeedForward, "dense": FeedForward, "lowrank": FeedForwardLowRank,
}  # fmt: skip


def _of(kinds: dict[str, Any], slot: str, config: dict[str, Any]) -> Any:
    kind = config["kind"]
    if kind not in kinds:
        raise ValueError(
            f"{slot}: got kind {kind!r}, need one of {sorted(kinds)}; try a newer filbert"
        )
    return kinds[kind]


def linear_from_config(config: dict[str, Any]) -> Any:
    """The linear module that ``config`` is of, with tensors yet to be loaded.

    Raises:
        ValueError: a kind that this filbert does not have.
    """
    return _of(LINEARS, "linear", config).from_config(config)


def attention_from_config(config: dict[str, Any], out: Any) -> Any:
    """As :func:`linear_from_config`; ``out`` is what takes the context."""
    return _of(ATTENTIONS, "attention", config).from_config(config, out)


def feed_forward_from_config(config: dict[str, Any]) -> Any:
    """As :func:`linear_from_config`."""
    kind = _of(FEED_FORWARDS, "feed_forward", config)
    up, down = linear_from_config(config["up"]), linear_from_config(config["down"])
    if "activation" in config:
        return kind(up, down, config["activation"])
    return kind(up, down)
