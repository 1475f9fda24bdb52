"""Attention over latents of low rank.

Paper: FlashSVD, arXiv 2508.01506.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...packed.batch import PackedBatch
from ..inference import check_no_gradient
from .linear import LinearLowRank

__all__ = ["LowRankAttention"]


class LowRankAttention(nn.Module):
    """One product to latents, and :func:`filbert.attn_lowrank`, which rebuilds query, key and value
    of a head of a sequence when it is their turn.

    Args:
        query_key_value: query, key and value over the same latents, N to 3*H*D.
        heads: H.
        scale: of the scores.
        splits_query: whether :meth:`forward_first` is to be used.

    Raises:
        ValueError: outputs that are no heads, or heads of a D that is no multiple of 16.
    """

    kind = "lowrank"
    gives_bits = False
    #: rows behind those of the batch may be given
    takes_more_rows = True
    head_padding = 0
    #: rows go through the product by themselves
    row_block: int | None = None
    #: the operator between the projections
    kernel = "attn_lowrank"

    def __init__(
        self, query_key_value: LinearLowRank, heads: int, scale: float, *, splits_query: bool
    ) -> None:
        super().__init__()
        outputs = query_key_value.out_features
        if outputs % (3 * heads) or outputs // (3 * heads) % ops.PANEL:
            raise ValueError(
                f"query_key_value: got {outputs} outputs for {heads} heads, need three times heads "
                f"of a multiple of {ops.PANEL}"
            )
        self.query_key_value = query_key_value
        self.in_features, self.width = query_key_value.in_features, outputs // 3
        self.num_heads, self.head_dim = heads, outputs // (3 * heads)
        self.scale, self.splits_query = scale, splits_query

    def linears(self) -> list[tuple[tuple[str, ...], Any]]:
        """See :meth:`filbert.nn.layer.EncoderLayer.linears`."""
        return [(("query", "key", "value"), self.query_key_value)]

    def derive(self, out: Any) -> None:
        """Nothing follows from other tensors here."""

    def sides(self) -> list[Tensor]:
        """The factors of query, key and value, each in the layout of :func:`filbert.pack_heads`:
        panels are whole, so these are parts of the packed factor."""
        return list(self.query_key_value.b.unflatten(0, (3, self.num_heads, -1)))

    def latent(self, rows: Tensor) -> Tensor:
        """``[T, R]`` of rows ``[T, N]``, for the rank in use."""
        linear = self.query_key_value
        panels = -(-linear.rank_in_use // ops.PANEL)
        return ops.linear_dense(rows, linear.a[:panels], linear.rank_in_use)

    def forward(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Attends within each sequence: rows ``[T, N]`` to ``[T, H*D]``. T may be more than the
        batch's rows."""
        linear = self.query_key_value
        check_no_gradient("LowRankAttention", rows=rows)
        latent, bias = self.latent(rows), batch.key_bias
        if bias is not None and len(bias) < len(rows):  # rows behind the batch's are nobody's keys
            bias = torch.nn.functional.pad(bias, (0, len(rows) - len(bias)))
        q, k, v = self.sides()
        context = ops.attn_lowrank(
            latent, q, k, v, batch.cu_seqlens, batch.max_seqlen, self.head_dim,
            [linear.rank_in_use] * 3, self.scale, bias=linear.bias, key_bias=bias,
        )  # fmt: skip
        return context.flatten(1)

    def forward_first(self, rows: Tensor, first: Tensor, batch: PackedBatch) -> Tensor:
        """The context of ``first``, the first row of each sequence, and of rows behind them."""
        heads = (self.num_heads, self.head_dim)
        check_no_gradient("LowRankAttention", rows=rows)
        q = self._part(first, 0, 1).view(-1, *heads)
        k, v = self._part(rows, 1, 3).view(-1, 2, *heads).unbind(1)
        # One query row a sequence; an empty one has no keys, and what becomes of it is dropped.
        one_each = torch.arange(batch.batch_size + 1, dtype=torch.int32)
        context, _ = ops.attn_varlen(
            q, k[: batch.num_rows], v[: batch.num_rows], one_each, batch.cu_seqlens, 1,
            batch.max_seqlen, self.scale, key_bias=batch.key_bias,
        )  # fmt: skip
        return context.flatten(1)

    def _part(self, rows: Tensor, begin: int, end: int) -> Tensor:
        """Sides [begin, end) of query, key and value, of rows ``[T, N]``."""
        linear, width, panels = self.query_key_value, self.width, self.width // ops.PANEL
        bias = None if linear.bias is None else linear.bias[begin * width : end * width]
        return ops.linear_lowrank(
            rows, linear.a, linear.b[begin * panels : end * panels], linear.rank_in_use,
            (end - begin) * width, bias,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal module with tensors yet to be loaded."""
        return {
            "kind": self.kind, "linears": [self.query_key_value.config()],
            "heads": self.num_heads, "scale": self.scale, "splits_query": self.splits_query,
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any], out: Any) -> LowRankAttention:
        """The inverse of :meth:`config`."""
        (linear,) = config["linears"]
        return cls(
            LinearLowRank.from_config(linear), config["heads"], config["scale"],
            splits_query=config["splits_query"],
        )  # fmt: skip
