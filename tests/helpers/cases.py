"""Shapes and inputs that every operator has to survive."""

from __future__ import annotations

import torch
from torch import Tensor

#: lengths of the sequences of a batch; none a multiple of any tile unless it is there to be one
LENGTHS: dict[str, list[int]] = {
    "one_token": [1],
    "single": [37],
    "ragged": [5, 0, 1, 130, 17, 64, 3],
    "all_empty": [0, 0],
    "no_sequences": [],
    "tiles": [16, 32, 48, 96],
    "many_tiny": [1, 2, 3, 1, 4] * 12,
    "one_huge": [1100, 2, 3],
    "key_block_edges": [511, 512, 513],
}

#: float16 is for CUDA backends; conftest leaves it out on the CPU
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def offsets(lengths: list[int]) -> Tensor:
    """``cu_seqlens`` int32 ``[B+1]`` of the given lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal values, the same on every run."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, device="cpu").to(dtype)
    return values.to(torch.get_default_device())
