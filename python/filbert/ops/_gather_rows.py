"""`gather_rows`: rows by index, which is packing and unpacking."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .shared import calling
from .shared.operator import Operator, register


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index[t]`` of ``x`` for every ``t``, zeros where the index is no row of ``x``.

    Packing is a gather by the places of the kept tokens; unpacking is a gather by each place's
    packed row, -1 where padding was. Either way every row is written once.

    Args:
        x: ``[R, N]`` of any dtype, contiguous rows.
        index: ``[T]`` int64.

    Returns:
        ``[T, N]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    if not calling.compiled("gather_rows", x):
        calling.one_device("gather_rows", x, index=index)
        return reference_gather_rows(x, index)
    return calling.kernels().gather_rows(x, index)


def reference_gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Meaning of :func:`filbert.ops.gather_rows`: row ``index[t]`` of x, or zeros."""
    valid = (index >= 0) & (index < x.shape[0])
    out = x.new_zeros((index.shape[0], x.shape[1]))
    out[valid] = x[index[valid]]
    return out


def _fake_gather_rows(x, index):
    calling.one_device("gather_rows", x, index=index)
    return x.new_empty((index.shape[0], x.shape[1]))


def _explain_gather_rows(x: Tensor, index: Tensor) -> dict[str, Any]:
    moved = 2 * index.shape[0] * x.shape[1] * x.element_size() + 8 * index.shape[0]
    return {"memory": f"{moved:,} bytes read and written at most"}


register(
    Operator(
        "gather_rows",
        "rows by index: packing and unpacking",
        fake=_fake_gather_rows,
        reference=reference_gather_rows,
        explain=_explain_gather_rows,
        float16_on_cpu=True,
    )
)
