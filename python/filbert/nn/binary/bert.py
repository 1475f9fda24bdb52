"""BERT with one-bit weights on packed rows: layer, encoder, and the model around them.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701; packed rows
are ByteTransformer's, arXiv 2210.03052.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ...packed.batch import PackedBatch
from ...packed.bits import PackedBits
from ..inference import check_no_gradient
from ..row_blocks import block_size, fill_up
from .attention import BinaryAttention, MixedAttention, attention_from_config
from .dot_packer import DotPacker
from .embedding import BinaryEmbedding, check_ids
from .linear import LinearBinary
from .linear_sum import LinearBinarySum, linear_from_config
from .row_packer import RowPacker, one_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BinaryBert", "BinaryBertOutput", "BinaryEncoder", "BinaryLayer"]


def _norm(size: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=eps).requires_grad_(False)


def packer_of(layer: LinearBinary | LinearBinarySum) -> RowPacker:
    """How ``layer`` packs its input (its first term, of a sum)."""
    return layer.packer if isinstance(layer, LinearBinary) else layer.terms[0].packer  # type: ignore[return-value]


class BinaryLayer(nn.Module):
    """One layer: attention, output projection + residual + LayerNorm, and the feed-forward part.

    With one-bit activations data stays packed between the float rows that leave each LayerNorm:
    [pack] -> query, key, value bits -> attention bits -> projection with residual and LayerNorm ->
    [pack] -> inner bits -> projection with residual and LayerNorm. With more bits per activation
    (BinaryBERT) attention and the inner activation are float.

    Args:
        attention: rows to the input of ``out``.
        out: the output projection, N features out.
        attn_norm: follows the first residual.
        up: to the inner size.
        down: back to N.
        ffn_norm: follows the second residual.
        activation: between ``up`` and ``down``, ``"gelu"`` (erf) or ``"relu"``.
    """

    def __init__(
        self,
        attention: BinaryAttention | MixedAttention,
        out: LinearBinary | LinearBinarySum,
        attn_norm: nn.LayerNorm,
        up: LinearBinary | LinearBinarySum,
        down: LinearBinary | LinearBinarySum,
        ffn_norm: nn.LayerNorm,
        *,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        one_of("activation", activation, ("gelu", "relu"))
        self.attention, self.out, self.attn_norm = attention, out, attn_norm.requires_grad_(False)
        self.up, self.down, self.ffn_norm = up, down, ffn_norm.requires_grad_(False)
        self.activation = activation
        self.derive()
        self.register_load_state_dict_post_hook(_derive_after_load)

    def derive(self) -> None:
        """Makes all integer thresholds again from the tensors that they follow from; done by itself
        after ``load_state_dict``."""
        into = packer_of(self.down)
        self.inner: DotPacker | None = None
        if isinstance(self.up, LinearBinary) and into.bits == 1:
            self.inner = self.up.codes_for(into, self.activation)
        self.attention.derive(packer_of(self.out))

    def forward(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Rows ``[T, N]`` to ``[T, N]``, both in the dtype of the LayerNorms."""
        context = self.attention(rows, batch)
        rows = self.out(context, residual=rows, norm=self.attn_norm)
        return self.down(self.inner_of(rows), residual=rows, norm=self.ffn_norm)

    def inner_of(self, rows: Tensor) -> Tensor | PackedBits:
        """What ``down`` takes: packed bits, or floats after the activation."""
        if self.inner is not None and isinstance(self.up, LinearBinary):
            return self.up.forward_bits(rows, self.inner)
        y = self.up(rows)
        return ops.bias_gelu_(y) if self.activation == "gelu" else y.relu_()

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal layer with tensors yet to be loaded."""
        return {
            "attention": self.attention.config(),
            "out": self.out.config(),
            "up": self.up.config(),
            "down": self.down.config(),
            "eps": [self.attn_norm.eps, self.ffn_norm.eps],
            "activation": self.activation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BinaryLayer:
        """The inverse of :meth:`config`."""
        out, up, down = (linear_from_config(config[name]) for name in ("out", "up", "down"))
        norms = [_norm(out.out_features, eps) for eps in config["eps"]]
        attention = attention_from_config(config["attention"], packer_of(out))
        return cls(attention, out, norms[0], up, down, norms[1], activation=config["activation"])


def _derive_after_load(layer: BinaryLayer, _: object) -> None:
    layer.derive()


class BinaryEncoder(nn.Module):
    """A stack of :class:`BinaryLayer`: packs once, stays packed, unpacks once.

    Args:
        layers: first to last.
    """

    def __init__(self, layers: Sequence[BinaryLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward_packed(self, rows: Tensor, batch: PackedBatch) -> Tensor:
        """Runs all layers on packed rows ``[T, N]``, in the dtype of the LayerNorms."""
        check_no_gradient("BinaryEncoder", rows=rows)
        for layer in self.layers:
            rows = layer(rows, batch)
        return rows

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Padded ``[B, S, N]`` to ``[B, S, N]``, zeros where padding was.

        Args:
            hidden_states: in the dtype of the LayerNorms.
            attention_mask: anything :meth:`filbert.PackedBatch.from_mask` reads; None for no
                padding.
        """
        batch = read_mask(attention_mask, hidden_states)
        return batch.unpack(self.forward_packed(batch.pack(hidden_states), batch))


def read_mask(mask: Tensor | None, x: Tensor) -> PackedBatch:
    """The batch that ``mask`` makes of ``x`` ``[B, S, ...]``."""
    if mask is None:
        return PackedBatch.full(x.shape[0], x.shape[1], x.device)
    batch = PackedBatch.from_mask(mask, x.shape[0])
    if batch.seq_len != x.shape[1]:
        raise ValueError(
            f"attention_mask: got {batch.seq_len} places (shape {tuple(mask.shape)}), need "
            f"{x.shape[1]} as in the input"
        )
    return batch


class BinaryBertOutput(NamedTuple):
    """What :class:`BinaryBert` returns.

    Attributes:
        last_hidden_state: ``[B, S, N]``, zeros where padding was.
        pooler_output: ``[B, N]``, or None without a pooler. Zeros for a text without tokens.
        logits: ``[B, labels]`` of the pooled output, or ``[B, S, labels]`` of every token where
            there is no pooler or the head is for questions; None without a classifier.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    logits: Tensor | None


class BinaryEmbeddings(nn.Module):
    """Words (bits), positions and token types (floats), added and normalised, on packed rows.

    Args:
        words: one table, or two that are added (BinaryBERT's split ones).
        position: float ``[P, N]``.
        token_type: float ``[types, N]``.
        norm: LayerNorm over the sum.
    """

    position: Tensor
    token_type: Tensor

    def __init__(
        self,
        words: Sequence[BinaryEmbedding],
        position: Tensor,
        token_type: Tensor,
        norm: nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.words = nn.ModuleList(words)
        self.register_buffer("position", position)
        self.register_buffer("token_type", token_type)
        self.norm = norm.requires_grad_(False)

    def forward(self, ids: Tensor, places: Tensor, types: Tensor | None) -> Tensor:
        """``[T]`` token ids, places in the padded text and token types (None: 0) to ``[T, N]``."""
        x = self.words[0](ids)
        for table in list(self.words)[1:]:
            x = x + table(ids)
        x = x.to(self.position.dtype) + F.embedding(places, self.position)
        if types is None:
            x = x + self.token_type[0]
        else:
            check_ids("token_type_ids", types)
            x = x + F.embedding(types, self.token_type)
        return ops.norm_residual(x, None, None, self.norm.weight, self.norm.bias, self.norm.eps)

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs."""
        return {
            "words": [table.config() for table in self.words],  # type: ignore[operator]
            "position": list(self.position.shape),
            "token_type": list(self.token_type.shape),
            "eps": self.norm.eps,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BinaryEmbeddings:
        """The inverse of :meth:`config`."""
        position, types = (torch.zeros(config[name]) for name in ("position", "token_type"))
        words = [BinaryEmbedding(**table) for table in config["words"]]
        return cls(words, position, types, _norm(position.shape[1], config["eps"]))


class BinaryBert(nn.Module):
    """A BERT for inference whose weights are bits. Made by :func:`filbert.binarize`, or read by
    :func:`filbert.load_binary`.

    Args:
        embeddings: tokens to rows.
        encoder: the layers.
        pooler: over the first row of each text, before a tanh; or None.
        classifier: of the pooled output or, without a pooler or with ``head="tokens"``, of every
            row; or None.
        head: ``"pooled"`` or ``"tokens"``.
        about: what is worth knowing about where it came from; kept in its file.

    Attributes:
        report: of :func:`filbert.binarize`, or None for a model from a file.

    Rows are kept in the dtype of the LayerNorms, float32 or after ``model.bfloat16()`` bfloat16, on
    CUDA also float16; scales, biases and thresholds stay float32. Rows that are rounded to bfloat16
    flip the bits of numbers near a threshold, and with them what follows: such a model is close to
    the float32 one layer by layer, but its output is that of another model of about equal quality.
    """

    def __init__(
        self,
        embeddings: BinaryEmbeddings,
        encoder: BinaryEncoder,
        pooler: LinearBinary | LinearBinarySum | None = None,
        classifier: nn.Linear | None = None,
        *,
        head: str = "pooled",
        about: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        one_of("head", head, ("pooled", "tokens"))
        self.embeddings, self.encoder, self.pooler = embeddings, encoder, pooler
        self.classifier = None if classifier is None else classifier.requires_grad_(False)
        self.head = "tokens" if pooler is None else head
        self.about = dict(about or {})
        self.report: Any = None
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BinaryBertOutput:
        """Runs the model. A text's result is bitwise the same alone, padded, and in any batch.

        Args:
            input_ids: ``[B, S]`` integers. A token's position is its place in this padded tensor,
                as in Hugging Face's BERT.
            attention_mask: anything :meth:`filbert.PackedBatch.from_mask` reads, or None.
            token_type_ids: ``[B, S]`` integers, or None for zeros.

        Raises:
            ValueError: shapes or dtypes that do not fit, or texts longer than there are positions.
            IndexError: ids or types that the tables do not have.
            RuntimeError: training mode while gradients are recorded.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "BinaryBert is inference only: it is in training mode and gradients are recorded, "
                "but bits have none to give; try model.eval(), or train the eager model of "
                "filbert.compress.binarize and convert it again"
            )
        limit = self.embeddings.position.shape[0]
        if input_ids.ndim != 2 or input_ids.shape[1] > limit:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S] with S at most "
                f"{limit}; try truncating"
            )
        if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
            raise ValueError(
                f"token_type_ids: got shape {tuple(token_type_ids.shape)}, need "
                f"{tuple(input_ids.shape)} as input_ids"
            )
        check_ids("input_ids", input_ids)
        if token_type_ids is not None:
            check_ids("token_type_ids", token_type_ids)
        self._check_rows()
        batch = read_mask(attention_mask, input_ids)
        rows = self.embed(input_ids, batch, token_type_ids)
        return self._heads(self.encoder.forward_packed(rows, batch), batch)

    def _check_rows(self) -> None:
        weight = self.embeddings.norm.weight
        allowed = [torch.float32, torch.bfloat16]
        if weight.is_cuda:
            allowed.append(torch.float16)
        if weight.dtype not in allowed:
            need = " or ".join(map(str, allowed))
            raise ValueError(
                f"rows: got {weight.dtype} on {weight.device.type}, need {need}; try model.float()"
            )

    def embed(
        self, input_ids: Tensor, batch: PackedBatch, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The packed rows ``[T, N]`` that enter the first layer."""
        flat = batch.indices
        types = None if token_type_ids is None else token_type_ids.flatten()[flat]
        places = flat % batch.seq_len if batch.seq_len else flat
        return self.embeddings(input_ids.flatten()[flat], places, types)

    def _heads(self, rows: Tensor, batch: PackedBatch) -> BinaryBertOutput:
        pooled = logits = None
        if self.pooler is not None:
            first = ops.gather_rows(rows, batch.starts)
            empty = (batch.lengths == 0).unsqueeze(1)
            pooled = self.pooler(first).tanh().masked_fill(empty, 0)
        if self.classifier is not None:
            if self.head == "tokens" or pooled is None:
                # On few row counts, as the GEMM library keeps something for each.
                filled = rows if rows.is_cuda else fill_up(rows, block_size(1))
                logits = batch.unpack(self.classifier(filled)[: batch.num_rows])
            else:
                logits = self.classifier(pooled)
        return BinaryBertOutput(batch.unpack(rows), pooled, logits)

    def derive(self) -> None:
        """Makes all integer thresholds again; ``load_state_dict`` does so by itself."""
        for layer in self.encoder.layers:
            layer.derive()  # type: ignore[operator]

    def to_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal model with tensors yet to be loaded."""
        head = None if self.classifier is None else [*self.classifier.weight.shape]
        return {
            "embeddings": self.embeddings.config(),
            "layers": [layer.config() for layer in self.encoder.layers],  # type: ignore[operator]
            "pooler": None if self.pooler is None else self.pooler.config(),
            "classifier": head,
            "head": self.head,
            "about": self.about,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BinaryBert:
        """The inverse of :meth:`to_config`."""
        head = config["classifier"]
        return cls(
            BinaryEmbeddings.from_config(config["embeddings"]),
            BinaryEncoder([BinaryLayer.from_config(layer) for layer in config["layers"]]),
            None if config["pooler"] is None else linear_from_config(config["pooler"]),
            None if head is None else nn.Linear(head[1], head[0]),
            head=config["head"],
            about=config["about"],
        )

    def save(self, path: str | Path) -> None:
        """Writes the model to one ``.safetensors`` file, see :func:`filbert.load_binary`."""
        from ..file import save_binary

        save_binary(self, path)
