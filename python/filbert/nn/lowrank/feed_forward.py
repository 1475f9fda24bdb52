"""A feed-forward part of two weights of low rank, in one pass.

Paper: FlashSVD, arXiv 2508.01506.
"""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..inference import check_no_gradient
from ..layer import FeedForward, RowNorm
from .linear import LinearLowRank, why_not_on_gpu

__all__ = ["FeedForwardLowRank"]


class FeedForwardLowRank(FeedForward):
    """Rows to rows by :func:`filbert.ffn_lowrank`: ``down(up(rows)) + rows``, and LayerNorm of
    that, without an activation as wide as the inner dimension. On a GPU, what the operator cannot
    do there runs as the two layers.

    Args:
        up: N to F, with its activation.
        down: F to N, without one.

    Raises:
        ValueError: layers that do not follow each other.
    """

    kind = "lowrank"

    def __init__(self, up: LinearLowRank, down: LinearLowRank) -> None:
        if down.in_features != up.out_features or down.activation is not None:
            raise ValueError(
                f"down: got {down.in_features} inputs and activation {down.activation!r}, need "
                f"{up.out_features} and none"
            )
        super().__init__(up, down)

    def why_not_fused(self) -> str | None:
        """Why a GPU does not run it as one operator, or None if it does."""
        return why_not_on_gpu(self.up, self.down)

    def forward(self, rows: Tensor, *, norm: RowNorm) -> Tensor:
        """Rows ``[T, N]`` to ``[T, N]``; each row on its own."""
        check_no_gradient("FeedForwardLowRank", rows=rows)
        up, down = self.up, self.down
        if up.on_gpu and self.why_not_fused() is not None:
            return super().forward(rows, norm=norm)
        return ops.ffn_lowrank(
            rows, up.a, up.b, up.bias, down.a, down.b, down.bias, up.rank_in_use,
            up.out_features, down.rank_in_use, down.out_features, up.activation or "none", rows,
            norm.weight, norm.bias, norm.eps,
        )  # fmt: skip
