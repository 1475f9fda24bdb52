"""A model for tests of what happens around it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class InstantEmbedder:
    """Rows that depend on the text and the pooling alone, with no model behind them."""

    dimension, max_length = 3, 48

    def __init__(self, pooling: str | None) -> None:
        self.sign = -1.0 if pooling == "cls" else 1.0

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [[0, *text.encode(), 0] for text in texts]

    def embed_ids(
        self, ids: list[list[int]], batches: list[list[int]], on_batch: Callable[[int, int], None]
    ) -> np.ndarray:
        on_batch(len(ids), sum(map(len, ids)))
        rows = [[len(one), sum(one), hash(tuple(one)) % 1000] for one in ids]
        return self.sign * np.array(rows, dtype=np.float32)
