"""Dense weights on their way to a copy of a module, in this process or in another one."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

__all__ = ["DenseWeights"]


class DenseWeights(list[Tensor]):
    """Tensors that were made to be copied, and that nobody else holds.

    ``copy.deepcopy``, ``pickle`` and ``torch.save`` treat them as the tensors they are. To another
    process PyTorch sends a tensor as a handle on shared memory, which is gone before the child has
    opened it if the parent does not keep the tensor. So these go as bytes.
    """


def _as_bytes(weights: DenseWeights) -> tuple[Any, tuple[Any, ...]]:
    return _from_bytes, tuple(
        (w.cpu().contiguous().view(torch.uint8).numpy(), w.dtype, w.device) for w in weights
    )


def _from_bytes(*sent: tuple[Any, torch.dtype, torch.device]) -> DenseWeights:
    with torch.inference_mode(False):
        return DenseWeights(
            torch.from_numpy(data).view(dtype).to(device) for data, dtype, device in sent
        )


ForkingPickler.register(DenseWeights, _as_bytes)
