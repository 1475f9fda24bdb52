"""Peak memory of an encoder of low rank, beside dense ones, chunks and plain pairs of factors.

The embeddings are made before: theirs would hide the encoder's.
"""

from __future__ import annotations

from ..results import Row
from ..runner import Options
from . import e2e_lowrank, memory

NAME = "memory_lowrank"
ABOUT = "as memory, for weights of low rank: dense, in chunks, factor pairs, filbert"
REFERENCE = memory.REFERENCE
RATE = memory.RATE
WORKLOADS = memory.WORKLOADS
DEFAULT = ("bert-base-512",)


def run(options: Options) -> list[Row]:
    """Measures every contestant asked for, one process each."""
    return memory.race(e2e_lowrank.NAME, options, DEFAULT)
