"""Row counts that an allocator and a GEMM library see: few, whatever the lengths of the texts.

Packing makes nearly every batch a new number of rows. An allocator that sees hundreds of sizes
keeps ever more, and oneDNN compiles and keeps a primitive for every number of rows. So rows are cut
into blocks of one size (by the threads there are when a layer is packed), and the last block is
filled up with rows of zeros to one of 8 sizes to an octave::

    T = 1150 rows    |------ 512 ------|------ 512 ------|-- 126 --|
    computed on      |------ 512 ------|------ 512 ------|--- 128 ---|

    sizes of the last block: 4 8 12 .. 32 | 36 40 .. 64 | 72 80 .. 128 | 144 .. 256 | 288 .. 512
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

__all__ = ["block_size", "by_blocks", "fill_up", "filled_rows"]


def block_size(threads: int) -> int:
    """Rows of a full block: 512, and more where that would leave threads with less than 128."""
    return max(512, 1 << (128 * threads - 1).bit_length())


def filled_rows(rows: int, block: int) -> int:
    """The least number of rows, at least ``rows``, of full blocks and one of the other sizes.

    At most 3 rows, or an eighth of the last block, are added.
    """
    full, last = divmod(rows, block)
    if last == 0:
        return rows
    step = max(4, 1 << max(0, (last - 1).bit_length() - 4))
    return full * block + -(-last // step) * step


def fill_up(rows: Tensor, block: int) -> Tensor:
    """Rows ``[T, N]`` with rows of zeros behind them, as many as :func:`filled_rows` says."""
    size = filled_rows(rows.shape[0], block)
    if size == rows.shape[0]:
        return rows
    filled = rows.new_empty((size, rows.shape[1]))
    filled[: rows.shape[0]] = rows
    filled[rows.shape[0] :] = 0
    return filled


def by_blocks(
    function: Callable[..., Tensor], block: int | None, *rows: Tensor, over: bool = False
) -> Tensor:
    """``function`` of row-wise operands, ``block`` rows after the other; None for all at once.

    What a block leaves between two GEMMs stays in the cache, is never allocated for all rows at
    once, and is reused by the allocator without new pages.

    Args:
        function: of as many operands.
        block: how many rows.
        rows: the operands, each of as many rows.
        over: whether results may be written over the first operand, which nobody needs later. That
            is done where they are alike.
    """
    count = rows[0].shape[0]
    if block is None or count <= block:
        return function(*rows)
    result: Tensor | None = None
    at = 0
    for part in zip(*(r.split(block) for r in rows), strict=True):
        made = function(*part)
        if result is None and over and made.dtype == rows[0].dtype and rows[0].is_contiguous():
            result = rows[0] if made.shape[1] == rows[0].shape[1] else None
        if result is None:
            result = made.new_empty((count, made.shape[1]))
        result[at : at + len(made)] = made
        at += len(made)
    return cast(Tensor, result)
