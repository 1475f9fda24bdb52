"""safetensors files whose tensors have a CRC-32 each."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["crc32_of", "verify"]


def crc32_of(t: Tensor) -> int:
    """Of the bytes of a tensor."""
    flat = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def verify(path: Path, crc32: Mapping[str, int]) -> None:
    """Reads a safetensors file and compares every tensor with its CRC-32.

    Raises:
        ValueError: a tensor that is cut off, missing, unknown or damaged; it is named.
    """
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            # A cut file is refused by safetensors as a whole; this says from which tensor on.
            header: Any = json.loads(file.read(length)) if length < size else None
            ends = {
                name: 8 + length + entry["data_offsets"][1]
                for name, entry in sorted(
                    ((n, e) for n, e in header.items() if n != "__metadata__"),
                    key=lambda pair: pair[1]["data_offsets"],
                )
            }
        except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
            raise ValueError(
                f"{path}: its header, which names the tensors, is damaged; try copying it again"
            ) from None
    if cut := [name for name, end in ends.items() if end > size]:
        raise ValueError(
            f"{path}: got {size} bytes, need {max(ends.values())}; {cut[0]} is cut off, and "
            f"{len(cut) - 1} tensors after it; try copying it again"
        )
    if missing := [name for name in crc32 if name not in ends]:
        raise ValueError(f"{path}: {missing[0]} is missing, and {len(missing) - 1} more tensors")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as held:
            for name in ends:
                if name not in crc32:
                    raise ValueError(f"{path}: {name} is unknown to its config")
                if crc32_of(held.get_tensor(name)) != crc32[name]:
                    raise ValueError(
                        f"{path}: {name} is damaged, its bytes are not those that were saved; try "
                        "copying the file again"
                    )
    except SafetensorError as error:
        raise ValueError(f"{path}: got no whole safetensors file ({error})") from error
