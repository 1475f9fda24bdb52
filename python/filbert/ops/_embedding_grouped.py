"""`embedding_grouped`: rows of 4- and 8-bit embedding tables, summed and normalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._norm_residual import reference_norm_residual
from .shared import calling
from .shared.operator import Operator, register


def pack_table(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """An embedding table as codes with a scale for each entry, rounded to nearest.

    Args:
        table: ``[V, N]`` of finite numbers.
        bits: 8 or 4.

    Returns:
        ``codes`` uint8 ``[V, N]``, or with 4 bits ``[V, ceil(N / 2)]``, elements ``2 i`` and
        ``2 i + 1`` in byte ``i``, low half first; and ``scale`` float32 ``[V]``. Code ``c`` is
        ``scale * (c - 2**(bits - 1))``.

    Raises:
        ValueError: other bits or no such table.
    """
    if bits not in (4, 8) or table.ndim != 2 or not bool(table.isfinite().all()):
        raise ValueError(
            f"table: got {tuple(table.shape)} for {bits} bits, need [V, N] of finite numbers and 4 "
            "or 8 bits"
        )
    half = 1 << (bits - 1)
    wide = table.detach().float()
    scale = wide.abs().amax(1) / (half - 1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    inverse = torch.where((1 / scale).isfinite(), 1 / scale, 0.0)
    codes = ((wide * inverse[:, None]).round().clamp(-half, half - 1) + half).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous(), scale


def unpack_table(codes: Tensor, scale: Tensor, width: int) -> Tensor:
    """The float32 table ``[V, width]`` that codes of :func:`pack_table` stand for."""
    if codes.shape[1] == width:
        return (codes.float() - 128) * scale[:, None]
    apart = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :width]
    return (apart.float() - 8) * scale[:, None]


def embedding_grouped(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    width: int,
    position_ids: Tensor | None = None,
    position_codes: Tensor | None = None,
    position_scale: Tensor | None = None,
    type_ids: Tensor | None = None,
    type_codes: Tensor | None = None,
    type_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """BERT's embeddings: a row of each table, their sum, and LayerNorm of that, in one pass.

    Args:
        ids: int64 ``[T]``, words.
        codes: uint8, of :func:`pack_table`; 4 or 8 bits by its width.
        scale: float32 ``[V]``.
        width: N.
        position_ids: int64 ``[T]``, with the next two; or None.
        position_codes: uint8.
        position_scale: float32.
        type_ids: int64 ``[T]``, token types, with the next two; or None.
        type_codes: uint8.
        type_scale: float32.
        norm_weight: ``[N]`` in ``dtype``: LayerNorm follows, with ``norm_bias``.
        norm_bias: ``[N]``, with ``norm_weight``.
        eps: of the LayerNorm.
        dtype: of the result: float32 or bfloat16, on CUDA also float16.

    Returns:
        ``[T, N]``: words plus token types plus positions, as transformers adds them. On CUDA the
        row of an id that is in no table is NaN. With bfloat16 and a LayerNorm on a CPU the sum is
        rounded before it.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; on a CPU an id that is in no table.

    Paper: Q-BERT, arXiv 1909.05840 (embeddings of 8 and 4 bits).
    """
    args = (
        ids, codes, scale, width, position_ids, position_codes, position_scale, type_ids,
        type_codes, type_scale, norm_weight, norm_bias, eps,
    )  # fmt: skip
    if not calling.compiled("embedding_grouped", ids):
        _one_device(*args)
        return reference_embedding_grouped(*args, dtype)
    return calling.kernels().embedding_grouped(*args, str(dtype).removeprefix("torch."))


def reference_embedding_grouped(
    ids, codes, scale, width, position_ids=None, position_codes=None, position_scale=None,
    type_ids=None, type_codes=None, type_scale=None, norm_weight=None, norm_bias=None, eps=0.0,
    dtype=torch.float32,
):  # fmt: skip
    """Meaning of :func:`filbert.ops.embedding_grouped`."""
    tables = (
        (ids, codes, scale),
        (type_ids, type_codes, type_scale),
        (position_ids, position_codes, position_scale),
    )
    parts = [unpack_table(c[i], s[i], width) for i, c, s in tables if i is not None]
    total = sum(parts[1:], parts[0])
    if norm_weight is None or norm_bias is None:
        return total.to(dtype)
    return reference_norm_residual(total, None, None, norm_weight, norm_bias, eps).to(dtype)


def _one_device(
    ids, codes, scale, width, position_ids=None, position_codes=None, position_scale=None,
    type_ids=None, type_codes=None, type_scale=None, norm_weight=None, norm_bias=None, *_,
):  # fmt: skip
    del width
    calling.one_device(
        "embedding_grouped", ids, codes=codes, scale=scale, position_ids=position_ids,
        position_codes=position_codes, position_scale=position_scale, type_ids=type_ids,
        type_codes=type_codes, type_scale=type_scale, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip


def _fake_embedding_grouped(
    ids, codes, scale, width, position_ids=None, position_codes=None, position_scale=None,
    type_ids=None, type_codes=None, type_scale=None, norm_weight=None, norm_bias=None, eps=0.0,
    dtype="float32",
):  # fmt: skip
    _one_device(
        ids, codes, scale, width, position_ids, position_codes, position_scale, type_ids,
        type_codes, type_scale, norm_weight, norm_bias,
    )  # fmt: skip
    return ids.new_empty((ids.shape[0], width), dtype=getattr(torch, dtype))


def _explain_embedding_grouped(
    ids: Tensor, codes: Tensor, scale: Tensor, width: int, *_: Any, **__: Any
) -> dict[str, Any]:
    rows = ids.shape[0]
    return {
        "memory": f"{rows * (codes.shape[1] + 4 + 4 * width):,} bytes read and written for words",
        "table": f"{codes.numel() + 4 * scale.numel():,} bytes, "
        f"{8 if codes.shape[1] == width else 4} bits",
    }


register(
    Operator(
        "embedding_grouped",
        "rows of 4- and 8-bit embedding tables, summed and normalised",
        fake=_fake_embedding_grouped,
        reference=reference_embedding_grouped,
        explain=_explain_embedding_grouped,
    )
)
