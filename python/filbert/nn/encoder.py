"""A post-LayerNorm transformer encoder that runs on packed rows from its first layer to its last.

Paper: ByteTransformer, arXiv 2210.03052. Unlike it, rows are packed once for all layers, padding
may lie anywhere, and sums and statistics are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..packed.batch import PackedBatch
from ..plan import PackedEncoderConfig
from ..refusals import below_autograd, has_tangent
from .dense.backends import Norm
from .dense.linear import PackedLinear, gelu_kind, row_dtype
from .row_blocks import block_size, fill_up

__all__ = ["LayerParts", "PackedEncoder", "PackedLayer"]


@dataclass(frozen=True)
class LayerParts:
    """The modules and numbers one encoder layer is made of, whatever its family calls them.

    With ``N`` the hidden size, ``H`` heads of ``D`` and ``F`` the inner size of the feed-forward
    part: ``query``, ``key``, ``value`` map N to H*D, ``out`` H*D to N, ``up`` N to F, ``down`` F to
    N. ``attn_norm`` and ``ffn_norm`` follow the residual additions.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    attn_norm: nn.LayerNorm
    up: nn.Linear
    activation: Callable[[Tensor], Tensor]
    down: nn.Linear
    ffn_norm: nn.LayerNorm
    num_heads: int
    head_dim: int
    scale: float
    #: the largest dropout probability in the layer; it must be off for the packed layer to be right
    dropout: float = 0.0
    #: where each module lies inside the original layer, for reports
    names: dict[str, str] = field(default_factory=dict)

    def linears(self) -> tuple[nn.Linear, ...]:
        """The six linear modules whose weights are packed."""
        return (self.query, self.key, self.value, self.out, self.up, self.down)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every weight and bias of the layer."""
        for module in (*self.linears(), self.attn_norm, self.ffn_norm):
            yield from module.parameters()


def _pad_heads(t: Tensor, dim: int, heads: int, padding: int) -> Tensor:
    """``t`` with ``padding`` zeros after each of the ``heads`` that lie in ``dim``."""
    if padding == 0:
        return t
    apart = t.detach().unflatten(dim, (heads, -1))
    zeros = apart.new_zeros([padding if d == dim + 1 else n for d, n in enumerate(apart.shape)])
    return torch.cat([apart, zeros], dim + 1).flatten(dim, dim + 1)


def _strip_heads(t: Tensor, dim: int, heads: int, padding: int) -> Tensor:
    """What :func:`_pad_heads` was given, bit for bit."""
    if padding == 0:
        return t
    apart = t.unflatten(dim, (heads, -1))
    return apart.narrow(dim + 1, 0, apart.shape[dim + 1] - padding).flatten(dim, dim + 1)


class PackedLayer(nn.Module):
    """One BERT layer on packed rows.

    QKV GEMM, attention per sequence, output GEMM, bias + residual + LayerNorm, feed-forward GEMMs
    with the activation between them, bias + residual + LayerNorm.

    Args:
        parts: the original modules. They are read, not kept.
        compute_dtype: dtype of the rows, float32 or bfloat16, on CUDA also float16;
            :func:`row_dtype` if not given.
        fold_bias: see :class:`filbert.plan.PackedEncoderConfig`.
        split_query: keep the query weight apart from key and value, which
            :meth:`forward_first` needs.
    """

    attn_norm_weight: Tensor
    attn_norm_bias: Tensor
    ffn_norm_weight: Tensor
    ffn_norm_bias: Tensor

    def __init__(
        self,
        parts: LayerParts,
        *,
        compute_dtype: torch.dtype | None = None,
        fold_bias: bool = True,
        split_query: bool = False,
    ) -> None:
        super().__init__()
        weight = parts.query.weight
        dtype = compute_dtype or row_dtype(weight.dtype, weight.device)
        # Zeros that lie in the weights save a GPU the copies that pad each call's q, k and v: they
        # make columns of zeros of all three, and the output weight multiplies those by zeros.
        self.head_padding = -parts.head_dim % ops.head_dims(weight.device).step
        self.num_heads, self.head_dim = parts.num_heads, parts.head_dim + self.head_padding
        self.scale = parts.scale
        #: rows that go through the GEMMs at once; None for all
        self.row_block: int | None = None
        if weight.device.type == "cpu":
            self.row_block = block_size(torch.get_num_threads())
        with torch.no_grad():
            q: Tensor | None = parts.query.bias
            k: Tensor | None = parts.key.bias
            v: Tensor | None = parts.value.bias
            out: Tensor | None = parts.out.bias
            if fold_bias:
                # softmax_j(q·(k_j + b_k)) is softmax_j(q·k_j), and sum_j p_j (v_j + b_v) is
                # sum_j p_j v_j + b_v because the weights sum to 1.
                if v is not None:
                    folded = parts.out.weight.double() @ v.double()
                    out = folded if out is None else out.double() + folded
                k = v = None

            def padded(t: Tensor, dim: int = 0) -> Tensor:
                return _pad_heads(t, dim, self.num_heads, self.head_padding)

            def packed(
                linears: Sequence[nn.Linear], biases: Sequence[Tensor | None]
            ) -> PackedLinear:
                bias = None
                if any(b is not None for b in biases):
                    bias = torch.cat(
                        [
                            padded(m.weight.new_zeros(m.out_features) if b is None else b.detach())
                            for m, b in zip(linears, biases, strict=True)
                        ]
                    )
                return PackedLinear([padded(m.weight) for m in linears], bias, compute_dtype=dtype)

            self.query: PackedLinear | None = None
            if split_query:
                self.query = packed([parts.query], [q])
                self.key_value = packed([parts.key, parts.value], [k, v])
            else:
                self.query_key_value = packed([parts.query, parts.key, parts.value], [q, k, v])
            self.out = PackedLinear([padded(parts.out.weight, 1)], out, compute_dtype=dtype)
            kind = gelu_kind(parts.activation)
            self.up = PackedLinear(
                [parts.up.weight], parts.up.bias, activation=kind, compute_dtype=dtype
            )
            # Any other activation is the model's own function, run on the GEMM's result.
            self.activation = None if kind else parts.activation
            self.down = PackedLinear([parts.down.weight], parts.down.bias, compute_dtype=dtype)
            for name, norm in (("attn_norm", parts.attn_norm), ("ffn_norm", parts.ffn_norm)):
                self._hold(f"{name}_weight", norm.weight, dtype)
                self._hold(f"{name}_bias", norm.bias, dtype)
            self.attn_norm_eps, self.ffn_norm_eps = parts.attn_norm.eps, parts.ffn_norm.eps
        for _, linear in self.linears():
            linear.trainable = False  # the encoder asks, once a call and for flags of now

    def _hold(self, name: str, value: Tensor | None, dtype: torch.dtype) -> None:
        if value is not None:
            value = value.detach().to(dtype).contiguous()
        self.register_buffer(name, value, persistent=False)

    def linears(self) -> list[tuple[str, PackedLinear]]:
        """The packed linears in the order of :meth:`LayerParts.linears`, each with its name."""
        return [(n, m) for n, m in self.named_children() if isinstance(m, PackedLinear)]

    def dense_weights(self) -> list[Tensor]:
        """The six dense weights in the order of :meth:`LayerParts.linears`, bit for bit."""
        weights = [weight for _, linear in self.linears() for weight in linear.dense_weights()]
        for index, dim in enumerate((0, 0, 0, 1)):  # query, key, value, out
            weights[index] = _strip_heads(weights[index], dim, self.num_heads, self.head_padding)
        return weights

    def shared_weights(self) -> list[Tensor | None]:
        """The six weights as views of the packed ones, each None where that is not possible."""
        weights: list[Tensor | None] = []
        for _, linear in self.linears():
            weights += linear.shared_weights() or [None] * len(linear.sizes)
        if self.head_padding:  # query, key, value and out have zeros that the originals have not
            weights[:4] = [None] * 4
        return weights

    def fill_up(self, rows: Tensor) -> Tensor:
        """``rows`` ``[T, N]`` and, on a CPU, rows of zeros behind them, so that the GEMMs see few
        numbers of rows and the allocator few sizes; see :mod:`filbert.nn.row_blocks`."""
        return rows if self.row_block is None else fill_up(rows, self.row_block)

    def forward(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Rows ``[T, N]`` to ``[T, N]``, in ``compute_dtype``. T may be more than the batch's rows;
        what becomes of the rows behind them means nothing."""
        heads = (self.num_heads, self.head_dim)
        if self.query is None:
            q, k, v = self._by_blocks(self.query_key_value, rows).view(-1, 3, *heads).unbind(1)
        else:
            q = self._by_blocks(self.query, rows).view(-1, *heads)
            k, v = self._by_blocks(self.key_value, rows).view(-1, 2, *heads).unbind(1)
        cu, longest = batch.cu_seqlens, batch.max_seqlen
        context, _ = ops.attn_varlen(
            q, k[: batch.num_rows], v[: batch.num_rows], cu, cu, longest, longest, self.scale,
            key_bias=batch.key_bias, tiles=batch.tiles,
        )  # fmt: skip
        return self._by_blocks(self._finish, context.flatten(1), rows)

    def forward_first(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """What the layer makes of the first row of each sequence, and nothing else.

        Keys and values still need all rows; query, attention, output and feed-forward do not.

        Returns:
            ``[batch_size, N]``; zeros for an empty sequence.
        """
        if self.query is None:
            return batch.pool(self(rows, batch)[: batch.num_rows], "cls")
        heads = (self.num_heads, self.head_dim)
        first = self.fill_up(ops.gather_rows(rows, batch.starts))
        q = self._by_blocks(self.query, first).view(-1, *heads)
        k, v = self._by_blocks(self.key_value, rows).view(-1, 2, *heads).unbind(1)
        # One query row a sequence; an empty one has no keys, and what becomes of it is dropped.
        one_each = torch.arange(batch.batch_size + 1, dtype=torch.int32, device=rows.device)
        context, _ = ops.attn_varlen(
            q, k[: batch.num_rows], v[: batch.num_rows], one_each, batch.cu_seqlens, 1,
            batch.max_seqlen, self.scale, key_bias=batch.key_bias,
        )  # fmt: skip
        empty = (batch.lengths == 0).unsqueeze(1)
        done = self._by_blocks(self._finish, context.flatten(1), first)
        return done[: batch.batch_size].masked_fill(empty, 0)

    def _by_blocks(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """``function`` of row-wise operands, a block of rows after the other.

        What a block leaves between two GEMMs stays in the cache, is never allocated for all rows at
        once, and is reused by the allocator without new pages.
        """
        count = rows[0].shape[0]
        if self.row_block is None or count <= self.row_block:
            return function(*rows)
        result: Tensor | None = None
        at = 0
        for block in zip(*(r.split(self.row_block) for r in rows), strict=True):
            part = function(*block)
            if result is None:
                result = part.new_empty((count, part.shape[1]))
            result[at : at + len(part)] = part
            at += len(part)
        return cast(Tensor, result)

    def _finish(self, context: Tensor, rows: Tensor) -> Tensor:
        """Everything after attention; each row on its own."""
        norm = Norm(self.attn_norm_weight, self.attn_norm_bias, self.attn_norm_eps)
        mixed = self.out(context, residual=rows, norm=norm)
        inner = self.up(mixed)
        if self.activation is not None:
            inner = self.activation(inner)
        norm = Norm(self.ffn_norm_weight, self.ffn_norm_bias, self.ffn_norm_eps)
        return self.down(inner, residual=mixed, norm=norm)


class PackedEncoder(nn.Module):
    """A stack of :class:`PackedLayer`: packs once, stays packed, unpacks once.

    Args:
        parts: one :class:`LayerParts` per layer.
        fold_bias: see :class:`filbert.plan.PackedEncoderConfig`.
        masked_rows: likewise.

    Attributes:
        model_dtype: dtype of the padded input and output.
        compute_dtype: dtype of the rows between layers; float32 for a bfloat16 model on a CPU
            without bf16 instructions.
        trainable: a weight required a gradient when it was packed.
    """

    masked_rows = "zero"

    def __init__(
        self, parts: Sequence[LayerParts], *, fold_bias: bool = True, masked_rows: str = "zero"
    ) -> None:
        super().__init__()
        self.masked_rows = PackedEncoderConfig(masked_rows=masked_rows).masked_rows
        self.trainable = any(p.requires_grad for part in parts for p in part.parameters())
        self._build(parts, fold_bias)

    def _build(
        self,
        parts: Sequence[LayerParts],
        fold_bias: bool,
        packed: Callable[[LayerParts, PackedLayer], None] | None = None,
    ) -> None:
        """Packs layer by layer. ``packed`` is told after each, so that the original weights of one
        layer can be let go before those of the next are packed."""
        weight = parts[0].query.weight
        self.model_dtype = weight.dtype
        self.compute_dtype = row_dtype(weight.dtype, weight.device)
        self.hidden_size = weight.shape[1]
        self.dropout = max(p.dropout for p in parts)
        self.packed_layers = nn.ModuleList()
        for index, layer_parts in enumerate(parts):
            layer = PackedLayer(
                layer_parts,
                compute_dtype=self.compute_dtype,
                fold_bias=fold_bias,
                split_query=index == len(parts) - 1,
            )
            self.packed_layers.append(layer)
            if packed is not None:
                packed(layer_parts, layer)

    @property
    def layers(self) -> list[PackedLayer]:
        """The layers, first to last."""
        return cast("list[PackedLayer]", list(self.packed_layers))

    def pack(self, hidden_states: Tensor, batch: PackedBatch) -> Tensor:
        """``[B, S, N]`` to rows ``[T, N]`` in ``compute_dtype``."""
        return batch.pack(hidden_states).to(self.compute_dtype)

    def forward_packed(self, rows: Tensor, batch: PackedBatch, pooled: str | None = None) -> Tensor:
        """Runs all layers on packed rows.

        Args:
            rows: ``[T, N]`` in ``compute_dtype``, as :meth:`pack` makes them.
            batch: where the rows come from.
            pooled: None for all rows, ``"cls"`` for the first row of each sequence: the last layer
                then computes only those.

        Returns:
            ``[T, N]``, or ``[batch_size, N]`` with ``pooled="cls"`` (zeros for an empty sequence).

        Raises:
            RuntimeError: training mode with dropout; or gradients are recorded, and the rows or the
                weights that were packed require one.
            ValueError: shapes, a dtype or a ``pooled`` that do not fit.
        """
        self._check_inference(rows)
        if rows.ndim != 2 or rows.shape != (batch.num_rows, self.hidden_size):
            raise ValueError(
                f"rows: got shape {tuple(rows.shape)}, need [{batch.num_rows}, {self.hidden_size}]"
            )
        if rows.dtype != self.compute_dtype:
            raise ValueError(
                f"rows: got {rows.dtype}, need {self.compute_dtype}; try PackedEncoder.pack"
            )
        if pooled not in (None, "cls"):
            raise ValueError(f"pooled: got {pooled!r}, need None or 'cls'")
        return self._run(rows, batch, pooled)

    def _run(self, rows: Tensor, batch: PackedBatch, pooled: str | None = None) -> Tensor:
        """:meth:`forward_packed` of what has been checked."""
        *body, last = self.layers
        with below_autograd():
            rows = last.fill_up(rows)
            for layer in body:
                rows = layer(rows, batch)
            if pooled is not None:
                return last.forward_first(rows, batch)
            return last(rows, batch)[: batch.num_rows]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Drop-in for a padded encoder.

        Args:
            hidden_states: ``[B, S, N]`` in ``model_dtype``.
            attention_mask: anything :meth:`PackedBatch.from_mask` reads, or None for no padding.

        Returns:
            ``[B, S, N]`` in ``model_dtype``; where padding was, zeros, or with
            ``masked_rows="compute"`` its hidden states.
        """
        self._check_inference(hidden_states)
        batch = self.read_mask(hidden_states, attention_mask)
        rows = self._run(self.pack(hidden_states, batch), batch)
        return batch.unpack(rows.to(hidden_states.dtype))

    def read_mask(self, hidden_states: Tensor, attention_mask: Tensor | None) -> PackedBatch:
        """The batch that ``attention_mask`` describes; checks it against ``hidden_states``. With
        ``masked_rows="compute"`` it holds every place, and those outside the mask are no keys."""
        if hidden_states.ndim != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"hidden_states: got shape {tuple(hidden_states.shape)}, "
                f"need [B, S, {self.hidden_size}]"
            )
        batch_size, seq_len = hidden_states.shape[:2]
        if attention_mask is None:
            return PackedBatch.full(batch_size, seq_len, hidden_states.device)
        every = self.masked_rows == "compute"
        batch = PackedBatch.from_mask(attention_mask, batch_size, every_query=every)
        if batch.seq_len != seq_len:
            raise ValueError(
                f"attention_mask: got {batch.seq_len} places (shape "
                f"{tuple(attention_mask.shape)}), need {seq_len} as in hidden_states"
            )
        return batch.keeping_every_row() if every else batch

    def _check_inference(self, x: Tensor) -> None:
        if self.training and self.dropout > 0:
            raise RuntimeError(
                f"filbert is inference only: the model is in training mode with dropout "
                f"{self.dropout:g}; try model.eval(), or filbert.revert(model) to train"
            )
        what: str | None = None
        if has_tangent(x):
            what = "the input has a tangent of forward-mode differentiation"
        elif not torch.is_grad_enabled():
            return
        elif x.requires_grad:
            what = "the input requires a gradient"
        elif self._wants_gradients():
            what = "gradients are recorded and weights that are packed in the encoder require one"
        if what is not None:
            raise RuntimeError(
                f"filbert is inference only: {what}, and the packed encoder has none to give; try "
                "'with torch.inference_mode():' (or torch.no_grad()) around the call, "
                "model.requires_grad_(False) if nothing before or in the encoder is to be trained, "
                "or filbert.revert(model) to train"
            )

    def _wants_gradients(self) -> bool:
        """Whether a weight that is packed here requires a gradient."""
        return self.trainable
