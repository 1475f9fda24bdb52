"""BERT with one-bit weights on packed rows: what lies around the encoder.

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
from ..encoder import PackedEncoder
from ..row_blocks import block_size, fill_up
from .embedding import BinaryEmbedding, check_ids
from .linear import LinearBinary
from .linear_sum import LinearBinarySum
from .row_packer import one_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BinaryBert", "BinaryBertOutput"]


def _norm(size: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=eps).requires_grad_(False)


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
        encoder: the layers, of bits or some of them dense.
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
        encoder: PackedEncoder,
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
        self.encoder.derive()

    def to_config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal model with tensors yet to be loaded."""
        head = None if self.classifier is None else [*self.classifier.weight.shape]
        return {
            "embeddings": self.embeddings.config(),
            "encoder": self.encoder.to_config(),
            "pooler": None if self.pooler is None else self.pooler.config(),
            "classifier": head,
            "head": self.head,
            "about": self.about,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BinaryBert:
        """The inverse of :meth:`to_config`."""
        from ..kinds import linear_from_config

        head = config["classifier"]
        return cls(
            BinaryEmbeddings.from_config(config["embeddings"]),
            PackedEncoder.from_config(config["encoder"]),
            None if config["pooler"] is None else linear_from_config(config["pooler"]),
            None if head is None else nn.Linear(head[1], head[0]),
            head=config["head"],
            about=config["about"],
        )

    def save(self, path: str | Path) -> None:
        """Writes the model to one ``.safetensors`` file, see :func:`filbert.load_binary`."""
        from ..file import save

        save(self, path)
