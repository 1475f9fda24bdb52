"""One encoder layer for every kind of module: slots, and the rows that go through them.

A slot is filled by a module of any kind, dense or of few bits, that keeps the slot's contract::

    rows [T, N] --> attention --> out + rows, attn_norm --> feed_forward, ffn_norm --> rows [T, N]

====================  ==========================================================================
slot                  contract
====================  ==========================================================================
``attention``         ``(rows, batch)`` to the context ``[T, H*D]``, floats or
                      :class:`~filbert.packed.bits.PackedBits`; projects query, key and value itself
``out``               a linear kind: ``(x, residual=, norm=)`` to rows; see below
``feed_forward``      ``(rows, norm=)`` to rows, its own residual included
====================  ==========================================================================

A linear kind has ``in_features``, ``out_features``, ``kernel``, ``reason``, ``nbytes``,
``config()`` and ``dense_weights()``, which is None where the weight it came from is gone.

Paper: ByteTransformer, arXiv 2210.03052.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of

from .. import ops
from ..packed.batch import PackedBatch
from ..packed.bits import PackedBits
from ..packed.codes import QuantizedRows
from .dense.short import ShortPath
from .row_blocks import block_size, by_blocks, fill_up

__all__ = ["EncoderLayer", "FeedForward", "RowNorm"]


class RowNorm(nn.Module):
    """The numbers of a LayerNorm that a linear layer applies last: ``weight`` and ``bias`` ``[N]``,
    or None, and ``eps``."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", weight), ("bias", bias)):
            held = None if value is None else value.detach().contiguous()
            self.register_buffer(name, held)

    @classmethod
    def of(cls, norm: nn.LayerNorm, dtype: torch.dtype) -> RowNorm:
        """The numbers of ``norm`` in ``dtype``, the rows'."""
        weight: Tensor | None = norm.weight
        bias: Tensor | None = norm.bias
        return cls(
            None if weight is None else weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            norm.eps,
        )

    @classmethod
    def empty(cls, size: int, eps: float) -> RowNorm:
        """One whose numbers are to be loaded."""
        return cls(torch.ones(size), torch.zeros(size), eps)


class FeedForward(nn.Module):
    """Rows to rows: ``down(activation(up(rows))) + rows``, and LayerNorm of that.

    Args:
        up: a linear kind, N to F; it may apply the activation itself.
        down: a linear kind, F to N.
        activation: of float rows ``[T, F]``, where ``up`` has none of its own.
    """

    kind = "dense"

    def __init__(
        self, up: Any, down: Any, activation: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.up, self.down, self.activation = up, down, activation

    def derive(self) -> None:
        """Makes again what follows from tensors that were loaded; nothing does here."""

    def inner_of(self, rows: Tensor) -> Tensor | PackedBits | QuantizedRows:
        """What ``down`` takes, of rows ``[T, N]``."""
        if self.activation is None and self.down.takes_codes and self.up.takes_codes:
            return cast(QuantizedRows, self.up.forward_codes(rows))
        inner: Tensor = self.up(rows)
        return inner if self.activation is None else self.activation(inner)

    def forward(self, rows: Tensor, *, norm: RowNorm) -> Tensor:
        """Rows ``[T, N]`` to ``[T, N]``; each row on its own."""
        return cast(Tensor, self.down(self.inner_of(rows), residual=rows, norm=norm))

    def config(self) -> dict[str, Any]:
        """What the module is built of when a file is read."""
        if self.activation is not None:
            name = getattr(self.activation, "__name__", type(self.activation).__name__)
            raise ValueError(
                f"activation: got {name}, the model's own function, need a form of GELU to save "
                "the packed layer; try saving the model it came from"
            )
        return {"kind": self.kind, "up": self.up.config(), "down": self.down.config()}


#: of a layer that has not looked for its short path yet
_UNKNOWN = object()


class EncoderLayer(nn.Module):
    """A post-LayerNorm layer made of slots; see the table of :mod:`filbert.nn.layer`.

    Attributes:
        row_block: rows that go through the linear layers at once, or None for all of them; set
            where a linear kind asks for blocks.

    Raises:
        ValueError: fillings that do not fit each other, with all reasons.
    """

    def __init__(
        self,
        attention: Any,
        out: Any,
        attn_norm: RowNorm,
        feed_forward: Any,
        ffn_norm: RowNorm,
    ) -> None:
        super().__init__()
        self.attention, self.out, self.attn_norm = attention, out, attn_norm
        self.feed_forward, self.ffn_norm = feed_forward, ffn_norm
        self._row_block: int | None = None
        self._short: ShortPath | object | None = _UNKNOWN
        if problems := self._problems():
            raise ValueError("layer: " + "; ".join(problems))
        self.derive()
        self.register_load_state_dict_post_hook(_derive_after_load)

    def _problems(self) -> list[str]:
        """Why the fillings do not fit each other."""
        found = []
        size = self.out.out_features
        if self.attention.gives_bits and not self.out.takes_bits:
            found.append(
                f"attention {type(self.attention).__name__} gives bits and out "
                f"{type(self.out).__name__} takes floats, need both of bits or neither"
            )
        if self.attention.width != self.out.in_features:
            found.append(
                f"attention gives {self.attention.width} features, out takes {self.out.in_features}"
            )
        up, down = self.feed_forward.up, self.feed_forward.down
        for name, got, need in (
            ("attention takes", self.attention.in_features, size),
            ("up takes", up.in_features, size),
            ("down takes", down.in_features, up.out_features),
            ("down gives", down.out_features, size),
        ):
            if got != need:
                found.append(f"{name} {got} features, need {need}")
        return found

    def derive(self) -> None:
        """Makes again what follows from other tensors; done by itself after ``load_state_dict``."""
        self.attention.derive(self.out)
        self.feed_forward.derive()
        self._short = _UNKNOWN
        wanted = [linear.row_blocks for _, linear in self.linears() if linear.row_blocks]
        if wanted:
            self.row_block = min(wanted) * block_size(torch.get_num_threads())

    @property
    def row_block(self) -> int | None:
        """See the class."""
        return self._row_block

    @row_block.setter
    def row_block(self, rows: int | None) -> None:
        self._row_block = self.attention.row_block = rows

    def linears(self) -> list[tuple[tuple[str, ...], Any]]:
        """Every linear module with the parts of :class:`~filbert.nn.parts.LayerParts` it holds, in
        their order."""
        return [
            *self.attention.linears(),
            (("out",), self.out),
            (("up",), self.feed_forward.up),
            (("down",), self.feed_forward.down),
        ]

    def dense_weights(self) -> list[Tensor | None]:
        """The six weights in the order of :meth:`~filbert.nn.parts.LayerParts.linears`, bit for
        bit; None for those that are gone."""
        weights: list[Tensor | None] = []
        for parts, linear in self.linears():
            weights += linear.dense_weights() or [None] * len(parts)
        return self._stripped(weights)

    def shared_weights(self) -> list[Tensor | None]:
        """The six weights as views of the packed ones, each None where that is not possible."""
        weights: list[Tensor | None] = []
        for parts, linear in self.linears():
            weights += linear.shared_weights() or [None] * len(parts)
        if self.attention.head_padding:  # four of them have zeros that the originals have not
            weights[:4] = [None] * 4
        return weights

    def keeps_weights(self) -> list[bool]:
        """For each of the six whether :meth:`dense_weights` can give it."""
        return [linear.keeps_weight for parts, linear in self.linears() for _ in parts]

    def _stripped(self, weights: list[Tensor | None]) -> list[Tensor | None]:
        if self.attention.head_padding:
            for index, dim in enumerate((0, 0, 0, 1)):  # query, key, value, out
                if (weight := weights[index]) is not None:
                    weights[index] = self.attention.strip_heads(weight, dim)
        return weights

    def fill_up(self, rows: Tensor) -> Tensor:
        """``rows`` ``[T, N]`` and, where they go by blocks, rows of zeros behind them, so that the
        GEMMs see few numbers of rows and an allocator few sizes; see
        :mod:`filbert.nn.row_blocks`."""
        return rows if self._row_block is None else fill_up(rows, self._row_block)

    def taken(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """``rows`` as attention takes them: filled up, or those of the batch alone."""
        return self.fill_up(rows) if self.attention.takes_more_rows else rows[: batch.num_rows]

    def forward(self, rows: Tensor, batch: PackedBatch) -> tuple[Tensor, PackedBatch]:
        """Rows ``[T, N]`` and their batch to the rows and the batch of the next layer.

        T may be more than the batch's rows; what becomes of the rows behind them means nothing.
        """
        rows = self.taken(rows, batch)
        if self._row_block is None or rows.shape[0] <= self._row_block:
            short = self._short_path()
            if short is not None:
                if short.open:
                    return short(rows, batch), batch
                self._short = _UNKNOWN  # it is found again, of what is there now
        return self._finish(self.attention(rows, batch), rows), batch

    def _short_path(self) -> ShortPath | None:
        """The way past the slots where they are all dense, found at the first call."""
        if self._short is _UNKNOWN:
            self._short = ShortPath.of(self)
        return cast("ShortPath | None", self._short)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_short": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._short = _UNKNOWN

    def forward_first(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """What the layer makes of the first row of each sequence, and, where attention can, nothing
        else: keys and values need all rows; query, output and feed-forward do not.

        Returns:
            ``[batch_size, N]``; zeros for an empty sequence.
        """
        if not self.attention.splits_query:
            rows, batch = self(rows, batch)
            return batch.pool(rows[: batch.num_rows], "cls")
        rows = self.fill_up(rows)
        first = self.fill_up(ops.gather_rows(rows, batch.starts))
        done = self._finish(self.attention.forward_first(rows, first, batch), first)
        return done[: batch.batch_size].masked_fill((batch.lengths == 0).unsqueeze(1), 0)

    def _finish(self, context: Tensor | PackedBits, rows: Tensor) -> Tensor:
        """Everything after attention; each row on its own."""
        if isinstance(context, PackedBits):
            mixed = self.out(context, residual=rows, norm=self.attn_norm)
            return by_blocks(self._feed_forward, self._row_block, mixed)
        # A hook may have kept the context.
        kept = self.attention._forward_hooks or hooks_of._global_forward_hooks
        return by_blocks(self._after_attention, self._row_block, context, rows, over=not kept)

    def _after_attention(self, context: Tensor, rows: Tensor) -> Tensor:
        return self._feed_forward(self.out(context, residual=rows, norm=self.attn_norm))

    def _feed_forward(self, rows: Tensor) -> Tensor:
        return cast(Tensor, self.feed_forward(rows, norm=self.ffn_norm))

    def config(self) -> dict[str, Any]:
        """What the layer is built of when a file is read."""
        return {
            "attention": self.attention.config(),
            "out": self.out.config(),
            "feed_forward": self.feed_forward.config(),
            "eps": [self.attn_norm.eps, self.ffn_norm.eps],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EncoderLayer:
        """The inverse of :meth:`config`, with tensors yet to be loaded."""
        from .kinds import attention_from_config, feed_forward_from_config, linear_from_config

        out = linear_from_config(config["out"])
        norms = [RowNorm.empty(out.out_features, eps) for eps in config["eps"]]
        return cls(
            attention_from_config(config["attention"], out), out, norms[0],
            feed_forward_from_config(config["feed_forward"]), norms[1],
        )  # fmt: skip


def _derive_after_load(layer: EncoderLayer, _: object) -> None:
    layer.derive()
