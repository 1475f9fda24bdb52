"""Dense query, key and value projections and fused attention between them, on packed rows.

Paper: ByteTransformer, arXiv 2210.03052.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...packed.batch import PackedBatch
from ..row_blocks import by_blocks

__all__ = ["DenseAttention", "pad_heads"]


def pad_heads(t: Tensor, dim: int, heads: int, padding: int) -> Tensor:
    """``t`` with ``padding`` zeros after each of the ``heads`` that lie in ``dim``."""
    if padding == 0:
        return t
    apart = t.detach().unflatten(dim, (heads, -1))
    zeros = apart.new_zeros([padding if d == dim + 1 else n for d, n in enumerate(apart.shape)])
    return torch.cat([apart, zeros], dim + 1).flatten(dim, dim + 1)


class DenseAttention(nn.Module):
    """One product for query, key and value, or the query's apart, and :func:`filbert.attn_varlen`.

    Args:
        linears: of a dense or a grouped kind: query, key and value in one layer, N to 3*H*D; or the
            query's, and key and value.
        heads: H.
        scale: of the scores.
        head_padding: zeros at the end of each head, which belong to D. They lie in the weights and
            save a GPU the copies that pad each call's query, key and value: they make columns of
            zeros, and the output weight multiplies those by zeros.
    """

    kind = "dense"
    gives_bits = False
    #: rows behind those of the batch may be given
    takes_more_rows = True

    def __init__(
        self,
        linears: Sequence[Any],
        heads: int,
        scale: float,
        *,
        head_padding: int = 0,
    ) -> None:
        super().__init__()
        self.query: Any = None
        if len(linears) == 2:
            self.query, self.key_value = linears
        else:
            (self.query_key_value,) = linears
        width = sum(linear.out_features for linear in linears)
        if len(linears) not in (1, 2) or width % (3 * heads):
            raise ValueError(
                f"linears: got {[m.out_features for m in linears]} outputs for {heads} heads, need "
                "query, key and value of equal size, as much for each head"
            )
        self.in_features, self.width = linears[0].in_features, width // 3
        self.num_heads, self.head_dim = heads, width // (3 * heads)
        self.scale, self.head_padding = scale, head_padding
        self.row_block: int | None = None

    @property
    def splits_query(self) -> bool:
        """Whether :meth:`forward_first` can leave out the other rows' queries."""
        return self.query is not None

    def linears(self) -> list[tuple[tuple[str, ...], Any]]:
        """See :meth:`filbert.nn.layer.EncoderLayer.linears`."""
        if self.query is None:
            return [(("query", "key", "value"), self.query_key_value)]
        return [(("query",), self.query), (("key", "value"), self.key_value)]

    @property
    def kernel(self) -> str:
        """The operator between the projections."""
        return "attn_varlen"

    def derive(self, out: Any) -> None:
        """Nothing follows from other tensors here."""

    def strip_heads(self, t: Tensor, dim: int) -> Tensor:
        """What :func:`pad_heads` was given, bit for bit."""
        apart = t.unflatten(dim, (self.num_heads, -1))
        kept = apart.shape[dim + 1] - self.head_padding
        return apart.narrow(dim + 1, 0, kept).flatten(dim, dim + 1)

    def forward(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Attends within each sequence: rows ``[T, N]`` to ``[T, H*D]``. T may be more than the
        batch's rows."""
        heads = (self.num_heads, self.head_dim)
        if self.query is None:
            made = by_blocks(self.query_key_value, self.row_block, rows)
            q, k, v = made.view(-1, 3, *heads).unbind(1)
        else:
            q = by_blocks(self.query, self.row_block, rows).view(-1, *heads)
            k, v = by_blocks(self.key_value, self.row_block, rows).view(-1, 2, *heads).unbind(1)
        cu, longest = batch.cu_seqlens, batch.max_seqlen
        context, _ = ops.attn_varlen(
            q, k[: batch.num_rows], v[: batch.num_rows], cu, cu, longest, longest, self.scale,
            key_bias=batch.key_bias, tiles=batch.tiles,
        )  # fmt: skip
        return context.flatten(1)

    def forward_first(self, rows: Tensor, first: Tensor, batch: PackedBatch) -> Tensor:
        """The context of ``first``, the first row of each sequence, and of rows behind them."""
        assert self.query is not None
        heads = (self.num_heads, self.head_dim)
        q = by_blocks(self.query, self.row_block, first).view(-1, *heads)
        k, v = by_blocks(self.key_value, self.row_block, rows).view(-1, 2, *heads).unbind(1)
        # One query row a sequence; an empty one has no keys, and what becomes of it is dropped.
        one_each = torch.arange(batch.batch_size + 1, dtype=torch.int32, device=rows.device)
        context, _ = ops.attn_varlen(
            q, k[: batch.num_rows], v[: batch.num_rows], one_each, batch.cu_seqlens, 1,
            batch.max_seqlen, self.scale, key_bias=batch.key_bias,
        )  # fmt: skip
        return context.flatten(1)

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal module with tensors yet to be loaded."""
        return {
            "kind": self.kind,
            "linears": [linear.config() for _, linear in self.linears()],
            "heads": self.num_heads,
            "scale": self.scale,
            "head_padding": self.head_padding,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], out: Any) -> DenseAttention:
        """The inverse of :meth:`config`."""
        from ..kinds import linear_from_config

        linears = [linear_from_config(linear) for linear in config["linears"]]
        return cls(linears, config["heads"], config["scale"], head_padding=config["head_padding"])
