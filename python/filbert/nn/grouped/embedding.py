"""An embedding table of 8 or 4 bits in the place of ``nn.Embedding``.

Paper: Q-BERT, arXiv 1909.05840.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops

__all__ = ["EmbeddingGrouped"]


class EmbeddingGrouped(nn.Module):
    """Rows of a table of codes, see :func:`filbert.embedding_grouped`. For inference only.

    Called as the ``nn.Embedding`` it was made of. Its ``state_dict`` has the dense table under the
    name ``weight``; one that is loaded becomes codes.

    Args:
        table: float ``[V, N]``.
        bits: 8 or 4.
        padding_idx: kept for those who ask; a row like any other.

    Attributes:
        codes: uint8, of :func:`filbert.ops.pack_table`.
        scale: float32 ``[V]``.
        dtype: of the rows it gives.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, table: Tensor, bits: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self.bits, self.padding_idx, self.dtype = bits, padding_idx, table.dtype
        codes, scale = ops.pack_table(table, bits)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, embedding: nn.Embedding, bits: int) -> EmbeddingGrouped:
        """With the table of ``embedding``."""
        return cls(embedding.weight.detach(), bits, embedding.padding_idx)

    @classmethod
    def of_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        width: int,
        bits: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> EmbeddingGrouped:
        """Of what :func:`filbert.ops.pack_table` gave for a table ``[V, width]`` of ``dtype``."""
        made = cls(torch.zeros(0, width, dtype=dtype), bits, padding_idx)
        made.num_embeddings = codes.shape[0]
        made.codes, made.scale = codes, scale
        return made

    @property
    def weight(self) -> Tensor:
        """The table ``[V, N]`` as numbers, made anew each time."""
        return ops.unpack_table(self.codes, self.scale, self.embedding_dim).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 4 * self.scale.numel()

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        return f"embedding_grouped {self.bits} bits"

    def dense(self) -> nn.Embedding:
        """An ``nn.Embedding`` with the numbers of this one."""
        return nn.Embedding.from_pretrained(self.weight, padding_idx=self.padding_idx)

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape to rows ``[..., N]``.

        Raises:
            RuntimeError: on a CPU, an id that is in no table.
        """
        half = self.dtype == torch.float16 and not input.is_cuda
        rows = ops.embedding_grouped(
            input.reshape(-1).to(torch.int64), self.codes, self.scale, self.embedding_dim,
            dtype=torch.float32 if half else self.dtype,
        )  # fmt: skip
        return rows.to(self.dtype).view(*input.shape, self.embedding_dim)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, shape = prefix + "weight", (self.num_embeddings, self.embedding_dim)
        table = state_dict.get(key)
        if table is None:
            missing_keys.append(key)
        elif table.shape != shape:
            error_msgs.append(f"{key}: got shape {list(table.shape)}, need {list(shape)}")
        else:
            codes, scale = ops.pack_table(table.to(self.codes.device), self.bits)
            self.codes, self.scale = codes, scale

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingGrouped:
        # Moves, but never casts: what is cast are the rows it gives.
        bare = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device))
        self.dtype = bare.dtype
        return super()._apply(lambda t: t.to(bare.device), recurse)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, kernel={self.kernel!r}"
