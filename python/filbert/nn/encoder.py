"""A post-LayerNorm transformer encoder that runs on packed rows from its first layer to its last.

Paper: ByteTransformer, arXiv 2210.03052. Unlike it, rows are packed once for all layers, padding
may lie anywhere, and sums and statistics are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..packed.batch import PackedBatch
from ..plan import EncoderPlan, PackedEncoderConfig
from ..refusals import below_autograd, has_tangent
from .build import CompressedParts, build_layer
from .dense.linear import row_dtype
from .layer import EncoderLayer
from .parts import LayerParts

__all__ = ["PackedEncoder"]


class PackedEncoder(nn.Module):
    """A stack of :class:`~filbert.nn.layer.EncoderLayer`: packs once, stays packed, unpacks once.
    Each layer has its own fillings, dense or of few bits.

    Args:
        layers: first to last.
        masked_rows: see :class:`filbert.plan.PackedEncoderConfig`.
        model_dtype: dtype of the padded input and output; that of the rows if not given.

    Attributes:
        compute_dtype: dtype of the rows between layers; float32 for a bfloat16 model on a CPU
            without bf16 instructions.
        dropout: the largest probability in the modules it was made of.
        trainable: a weight required a gradient when it was packed.

    Raises:
        ValueError: no layers, or layers whose rows differ in size or dtype.
    """

    masked_rows = "zero"
    dropout = 0.0
    trainable = False

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        *,
        masked_rows: str = "zero",
        model_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.masked_rows = PackedEncoderConfig(masked_rows=masked_rows).masked_rows
        rows = {(layer.out.out_features, _row_dtype_of(layer)) for layer in layers}
        if len(rows) != 1:
            got = ", ".join(f"{size} of {dtype}" for size, dtype in sorted(rows, key=str))
            raise ValueError(f"layers: got rows of {got or 'no layer'}, need one size and dtype")
        ((self.hidden_size, _),) = rows
        self._model_dtype = model_dtype
        self.packed_layers = nn.ModuleList(layers)

    @classmethod
    def from_parts(
        cls, parts: Sequence[LayerParts], *, fold_bias: bool = True, masked_rows: str = "zero"
    ) -> PackedEncoder:
        """All layers dense, one for each :class:`~filbert.nn.parts.LayerParts`.

        Args:
            parts: the original modules. They are read, not kept.
            fold_bias: see :class:`filbert.plan.PackedEncoderConfig`.
            masked_rows: likewise.
        """
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder.masked_rows = PackedEncoderConfig(masked_rows=masked_rows).masked_rows
        encoder.trainable = any(p.requires_grad for part in parts for p in part.parameters())
        encoder._build(parts, fold_bias)
        return encoder

    def _build(
        self,
        parts: Sequence[LayerParts],
        fold_bias: bool,
        packed: Callable[[LayerParts, EncoderLayer], None] | None = None,
        plan: EncoderPlan | None = None,
        compressed: Sequence[CompressedParts] | None = None,
    ) -> None:
        """Packs layer by layer. ``packed`` is told after each, so that the original weights of one
        layer can be let go before those of the next are packed."""
        weight = parts[0].query.weight
        self._model_dtype = weight.dtype
        self.hidden_size = weight.shape[1]
        self.dropout = max(p.dropout for p in parts)
        rows = row_dtype(weight.dtype, weight.device)
        self.packed_layers = nn.ModuleList()
        for index, layer_parts in enumerate(parts):
            layer = build_layer(
                layer_parts,
                (plan or EncoderPlan()).of(index),
                compressed=None if compressed is None else compressed[index],
                compute_dtype=rows,
                fold_bias=fold_bias,
                split_query=index == len(parts) - 1,
            )
            self.packed_layers.append(layer)
            if packed is not None:
                packed(layer_parts, layer)

    @property
    def layers(self) -> list[EncoderLayer]:
        """The layers, first to last."""
        return cast("list[EncoderLayer]", list(self.packed_layers))

    @property
    def compute_dtype(self) -> torch.dtype:
        """See the class."""
        return _row_dtype_of(cast(EncoderLayer, self.packed_layers[0]))

    @property
    def model_dtype(self) -> torch.dtype:
        """See the class."""
        return self._model_dtype or self.compute_dtype

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
        *body, last = layers = self.layers
        with below_autograd():
            rows = layers[0].taken(rows, batch)  # here, so that the rows before are free
            for layer in body:
                rows, batch = layer(rows, batch)
            if pooled is not None:
                return last.forward_first(rows, batch)
            rows, batch = last(rows, batch)
            return rows[: batch.num_rows]

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

    def derive(self) -> None:
        """Makes again what follows from tensors that were loaded; ``load_state_dict`` does so by
        itself."""
        for layer in self.layers:
            layer.derive()

    def to_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal encoder with tensors yet to be loaded."""
        dtype = None if self._model_dtype is None else str(self._model_dtype).split(".")[-1]
        return {
            "layers": [layer.config() for layer in self.layers],
            "masked_rows": self.masked_rows,
            "model_dtype": dtype,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedEncoder:
        """The inverse of :meth:`to_config`."""
        name = config["model_dtype"]
        return cls(
            [EncoderLayer.from_config(layer) for layer in config["layers"]],
            masked_rows=config["masked_rows"],
            model_dtype=None if name is None else getattr(torch, name),
        )

    def save(self, path: str | Path) -> None:
        """Writes the packed layers to one ``.safetensors`` file, see :func:`load_encoder`."""
        from .file import save

        save(self, path)


def _row_dtype_of(layer: EncoderLayer) -> torch.dtype:
    linear = layer.out
    if (dtype := getattr(linear, "compute_dtype", None)) is not None:
        return cast(torch.dtype, dtype)
    weight = layer.attn_norm.weight
    return torch.float32 if weight is None else weight.dtype
