"""The way of a few rows through a dense layer: its operators with nothing between them.

Getting from slot to slot takes Python about 0.1 ms a layer, which is what the products of one short
text take. The operators and their operands are the slots' own, so the result is theirs bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of

from ...packed.batch import PackedBatch
from .attention import DenseAttention
from .backends import FilbertGemm
from .linear import PackedLinear

__all__ = ["ShortPath"]

#: the operands of one product behind its rows: weight, outputs, bias, activation
_Product = tuple[Tensor, int, Tensor | None, str]
#: what follows a product: a LayerNorm's weight, bias and eps
_Norm = tuple[Tensor, Tensor, float]


class _Operands(NamedTuple):
    """What the calls of one layer take beside rows."""

    projections: tuple[_Product, ...]  # query, key and value; or the query's, and the other two's
    heads: int
    head_dim: int
    scale: float
    out: _Product
    attn_norm: _Norm
    up: _Product
    down: _Product
    ffn_norm: _Norm


def _product(linear: Any) -> _Product | None:
    """The operands of a linear module that runs :func:`filbert.linear_dense`, or None."""
    if type(linear) is not PackedLinear or not isinstance(linear._backend, FilbertGemm):
        return None
    backend = linear._backend
    return backend.packed, backend.outputs, linear.bias, linear.activation or "none"


class ShortPath:
    """See the module. Made of a layer as it is; a layer that changes makes another."""

    def __init__(self, operands: _Operands, layer: nn.Module) -> None:
        self._operands = operands
        self._linear = torch.ops.filbert.linear_dense.default
        self._attention = torch.ops.filbert.attn_varlen.default
        # What it was made of: a part may be replaced later, and so may a linear module's weight.
        modules = list(layer.modules())
        self._parts = [(m._modules, name) for m in modules for name in m._modules]
        self._there = [parts[name] for parts, name in self._parts]
        self._linears = [m for m in modules if isinstance(m, PackedLinear)]
        self._backends = [linear._backend for linear in self._linears]
        # The dicts themselves: a hook that is put on later is in one of them.
        passed = [m for m in modules if m is not layer]
        self._hooks = [h for m in passed for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks += [hooks_of._global_forward_hooks, hooks_of._global_forward_pre_hooks]

    @classmethod
    def of(cls, layer: Any) -> ShortPath | None:
        """That of an :class:`~filbert.nn.layer.EncoderLayer`, or None where a slot is of another
        kind or runs another library."""
        attention, feed_forward = layer.attention, layer.feed_forward
        if type(attention) is not DenseAttention or feed_forward.activation is not None:
            return None
        projections = [_product(linear) for _, linear in attention.linears()]
        out, up, down = map(_product, (layer.out, feed_forward.up, feed_forward.down))
        norms = [(n.weight, n.bias, n.eps) for n in (layer.attn_norm, layer.ffn_norm)]
        found = [*projections, out, up, down]
        if any(product is None for product in found) or any(norm[0] is None for norm in norms):
            return None
        operands = _Operands(
            tuple(projections), attention.num_heads, attention.head_dim,  # type: ignore[arg-type]
            attention.scale, out, norms[0], up, down, norms[1],  # type: ignore[arg-type]
        )  # fmt: skip
        return cls(operands, layer)

    @property
    def open(self) -> bool:
        """Whether the modules that it passes by are those it was made of, and nobody watches."""
        if any(self._hooks) or [parts[name] for parts, name in self._parts] != self._there:
            return False
        return [linear._backend for linear in self._linears] == self._backends

    def __call__(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Rows ``[T, N]`` to ``[T, N]``; T may be more than the batch's rows."""
        linear, o = self._linear, self._operands
        shape = (o.heads, o.head_dim)
        made = [linear(rows, *p, None, None, None, 0.0) for p in o.projections]
        if len(made) == 1:
            q, k, v = made[0].view(-1, 3, *shape).unbind(1)
        else:
            q = made[0].view(-1, *shape)
            k, v = made[1].view(-1, 2, *shape).unbind(1)
        if rows.shape[0] != batch.num_rows:
            k, v = k[: batch.num_rows], v[: batch.num_rows]
        cu, longest = batch.cu_seqlens, batch.max_seqlen
        context, _ = self._attention(
            q, k, v, cu, cu, longest, longest, o.scale, None, -1, -1, batch.key_bias, None
        )
        mixed = linear(context.flatten(1), *o.out, rows, *o.attn_norm)
        inner = linear(mixed, *o.up, None, None, None, 0.0)
        return linear(inner, *o.down, mixed, *o.ffn_norm)
