"""The way of a few rows through a layer of dense, grouped or low-rank slots: its operators with
nothing between them.

Getting from slot to slot takes Python about 0.1 ms a layer, which is what the products of one short
text take. The operators and their operands are the slots' own, so the result is theirs bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of

from ... import _load
from ...packed.batch import PackedBatch
from ..grouped.linear import LinearGrouped
from ..lowrank.attention import LowRankAttention
from ..lowrank.linear import LinearLowRank
from .attention import DenseAttention
from .backends import FilbertGemm
from .linear import PackedLinear

__all__ = ["ShortPath"]

#: rows, and what follows the product: residual, LayerNorm's weight and bias, and eps
_Product = Callable[..., Tensor]
#: a LayerNorm's weight, bias and eps
_Norm = tuple[Tensor, Tensor, float]


_LINEARS = (PackedLinear, LinearGrouped, LinearLowRank)


class _Calls(NamedTuple):
    """What one layer calls."""

    attention: Callable[[Tensor, PackedBatch], Tensor]
    out: _Product
    attn_norm: _Norm
    feed_forward: Callable[[Tensor, _Norm], Tensor]
    ffn_norm: _Norm


def _product(linear: Any) -> _Product | None:
    """The product of a linear module that runs one of filbert's operators, or None."""
    if type(linear) is LinearGrouped:
        operands, name = tuple(linear.operands().values()), linear.dtype_name
        weight, behind = operands[:4], operands[4:]
        grouped = torch.ops.filbert.linear_grouped.default

        def of_few_bits(
            x: Tensor, residual: Any = None, gamma: Any = None, beta: Any = None, eps: float = 0.0
        ) -> Tensor:
            return grouped(x, *weight, None, None, *behind, residual, gamma, beta, eps, name)

        return of_few_bits
    if type(linear) is LinearLowRank:
        if linear.on_gpu:
            return None
        a, b, rank, count = linear.a, linear.b, linear.rank_in_use, linear.out_features
        add, act = linear.bias, linear.activation or "none"
        lowrank = torch.ops.filbert.linear_lowrank.default

        def of_low_rank(
            x: Tensor, residual: Any = None, gamma: Any = None, beta: Any = None, eps: float = 0.0
        ) -> Tensor:
            return lowrank(x, a, b, rank, count, add, act, residual, gamma, beta, eps)

        return of_low_rank
    if type(linear) is not PackedLinear or not isinstance(linear._backend, FilbertGemm):
        return None
    packed, outputs = linear._backend.packed, linear._backend.outputs
    bias, activation = linear.bias, linear.activation or "none"
    dense = torch.ops.filbert.linear_dense.default

    def of_floats(
        x: Tensor, residual: Any = None, gamma: Any = None, beta: Any = None, eps: float = 0.0
    ) -> Tensor:
        return dense(x, packed, outputs, bias, activation, residual, gamma, beta, eps)

    return of_floats


def _attention(attention: Any) -> Callable[[Tensor, PackedBatch], Tensor] | None:
    """Projections and attention between them, of rows of which the last may be nobody's."""
    attend = torch.ops.filbert.attn_varlen.default
    if type(attention) is LowRankAttention:
        return attention.forward  # has nothing between its two operators
    if type(attention) is not DenseAttention:
        return None
    projections = [_product(linear) for _, linear in attention.linears()]
    heads, scale = (attention.num_heads, attention.head_dim), attention.scale
    first, *second = projections
    if first is None or None in second:
        return None
    others = second[0] if second else None

    def dense(rows: Tensor, batch: PackedBatch) -> Tensor:
        if others is None:
            q, k, v = first(rows).view(-1, 3, *heads).unbind(1)
        else:
            q = first(rows).view(-1, *heads)
            k, v = others(rows).view(-1, 2, *heads).unbind(1)
        if rows.shape[0] != batch.num_rows:
            k, v = k[: batch.num_rows], v[: batch.num_rows]
        cu, longest = batch.cu_seqlens, batch.max_seqlen
        context, _ = attend(
            q, k, v, cu, cu, longest, longest, scale, None, -1, -1, batch.key_bias, None
        )
        return context.flatten(1)

    return dense


def _feed_forward(feed_forward: Any) -> Callable[[Tensor, _Norm], Tensor] | None:
    """Both products of a feed-forward part, with codes between them where both have few bits."""
    up, down = feed_forward.up, feed_forward.down
    if feed_forward.kind == "lowrank":
        factors = (
            up.a, up.b, up.bias, down.a, down.b, down.bias, up.rank_in_use, up.out_features,
            down.rank_in_use, down.out_features, up.activation or "none",
        )  # fmt: skip
        in_one = torch.ops.filbert.ffn_lowrank.default
        return lambda rows, norm: in_one(rows, *factors, rows, *norm)
    first, second = _product(up), _product(down)
    if first is None or second is None:
        return None
    if type(up) is LinearGrouped and type(down) is LinearGrouped:
        ups, downs = (tuple(linear.operands().values()) for linear in (up, down))
        to_codes = torch.ops.filbert.linear_grouped_codes.default
        of_codes, name = torch.ops.filbert.linear_grouped.default, down.dtype_name

        def by_codes(rows: Tensor, norm: _Norm) -> Tensor:
            _, codes, scale, zero = to_codes(rows, *ups[:4], None, None, *ups[4:])
            return of_codes(codes, *downs[:4], scale, zero, *downs[4:], rows, *norm, name)

        return by_codes
    return lambda rows, norm: second(first(rows), rows, *norm)


class ShortPath:
    """See the module. Made of a layer as it is; a layer that changes makes another."""

    def __init__(self, calls: _Calls, layer: nn.Module) -> None:
        self._calls = calls
        # What it was made of: a part may be replaced later, and so may a linear module's weight.
        modules = list(layer.modules())
        self._parts = [(m._modules, name) for m in modules for name in m._modules]
        self._there = [parts[name] for parts, name in self._parts]
        self._linears = [m for m in modules if isinstance(m, _LINEARS)]
        self._held = [_held_by(linear) for linear in self._linears]
        # The dicts themselves: a hook that is put on later is in one of them.
        passed = [m for m in modules if m is not layer]
        self._hooks = [h for m in passed for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [hooks_of._global_forward_hooks, hooks_of._global_forward_pre_hooks]

    @classmethod
    def of(cls, layer: Any) -> ShortPath | None:
        """That of an :class:`~filbert.nn.layer.EncoderLayer`, or None where a slot is of another
        kind or runs another library."""
        if not _load.have_ops() or layer.feed_forward.activation is not None:
            return None
        attention, out = _attention(layer.attention), _product(layer.out)
        ffn = _feed_forward(layer.feed_forward)
        norms = [(n.weight, n.bias, n.eps) for n in (layer.attn_norm, layer.ffn_norm)]
        if attention is None or out is None or ffn is None:
            return None
        if any(norm[0] is None for norm in norms):
            return None
        return cls(_Calls(attention, out, norms[0], ffn, norms[1]), layer)

    @property
    def open(self) -> bool:
        """Whether the modules that it passes by are those it was made of, and nobody watches."""
        if any(self._hooks) or [parts[name] for parts, name in self._parts] != self._there:
            return False
        return all(
            _held_by(linear) is held for linear, held in zip(self._linears, self._held, strict=True)
        )

    def __call__(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Rows ``[T, N]`` to ``[T, N]``; T may be more than the batch's rows."""
        o = self._calls
        mixed = o.out(o.attention(rows, batch), rows, *o.attn_norm)
        return o.feed_forward(mixed, o.ffn_norm)


def _held_by(linear: Any) -> Any:
    """What a linear module computes with: something else where its weight is."""
    if isinstance(linear, LinearGrouped):
        return linear.totals
    return linear.rank_in_use if isinstance(linear, LinearLowRank) else linear._backend
