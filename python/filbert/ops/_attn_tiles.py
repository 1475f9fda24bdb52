"""`attn_tiles`: the work list of `attn_varlen` on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .shared import calling
from .shared.operator import Operator, register


def tile_capacity(rows_q: int, sequences: int) -> int:
    """The most tiles that :func:`attn_tiles` can list; as in csrc/args/attn_tiles.h, to which the
    tests hold it."""
    return rows_q // 128 + sequences + 1


def _has_tiles(cu_seqlens: Tensor) -> bool:
    """Whether the kernels that would run on ``cu_seqlens`` take a work list."""
    return cu_seqlens.device.type != "cpu" and calling.compiled("attn_tiles", cu_seqlens)


def attn_tiles(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows_q: int, rows_k: int) -> Tensor:
    """The work list of :func:`attn_varlen` on a GPU: every sequence in tiles of up to 128 query
    rows, those with most to do first.

    It is made on the device, without the host learning any length, and depends neither on heads nor
    on dtype: make it once for all layers of a forward.

    Args:
        cu_seqlens_q: ``[B+1]`` int32 on a CUDA device, as for :func:`attn_varlen`.
        cu_seqlens_k: ``[B+1]`` int32, likewise.
        rows_q: ``q.shape[0]``.
        rows_k: ``k.shape[0]``.

    Returns:
        ``[4 + 8 * (rows_q // 128 + B + 1)]`` int32: how many tiles have one, two and four heads to
        a block, and a zero; then eight values a tile: first query row, query rows, first key row,
        keys, the key the first query stands at, sequence, and two that mean nothing. What lies
        behind the last tile is undefined.

    Raises:
        RuntimeError: offsets that are not int32 ``[B+1]`` on one CUDA device.
    """
    if not _has_tiles(cu_seqlens_q):
        calling.one_device("attn_tiles", cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        raise RuntimeError(
            f"attn_tiles: device; got {cu_seqlens_q.device}; need a CUDA device and filbert's CUDA "
            "kernels; try attn_varlen without tiles"
        )
    return calling.kernels().attn_tiles(cu_seqlens_q, cu_seqlens_k, rows_q, rows_k)


def _fake_attn_tiles(cu_q, cu_k, rows_q, rows_k):
    calling.one_device("attn_tiles", cu_q, cu_seqlens_k=cu_k)
    return cu_q.new_empty(4 + 8 * tile_capacity(rows_q, cu_q.shape[0] - 1))


def _explain_attn_tiles(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows_q: int, rows_k: int
) -> dict[str, Any]:
    del cu_seqlens_k, rows_k
    tiles = tile_capacity(rows_q, cu_seqlens_q.shape[0] - 1)
    return {"tiles": f"at most {tiles:,}, {32 * tiles + 16:,} bytes, by one block of 256 threads"}


register(
    Operator(
        "attn_tiles",
        "the work list of attn_varlen on a GPU",
        fake=_fake_attn_tiles,
        reference=None,
        explain=_explain_attn_tiles,
        devices=("cuda",),
    )
)
