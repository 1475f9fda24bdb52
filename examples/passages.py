"""What the examples train on: Python's help topics, in batches of texts of like length."""

from __future__ import annotations

import torch

from filbert.app.corpus import help_passages
from filbert.app.embedder import Embedder

#: ids and attention mask, both [B, S]
Batch = tuple[torch.Tensor, torch.Tensor]


def make_batches(
    embedder: Embedder, texts: list[str], batch_size: int, max_length: int
) -> list[Batch]:
    """Padded batches of neighbours in length, so that little of them is padding."""
    ids = sorted((one[:max_length] for one in embedder.tokenize(texts)), key=len)
    return [embedder.pad(ids[i : i + batch_size]) for i in range(0, len(ids), batch_size)]


def mean_pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The embedding of each text: the mean over its tokens."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def split_passages(limit: int | None = None) -> tuple[list[str], list[str]]:
    """Texts to train on, and others that training must not see.

    Args:
        limit: only so many passages, evenly spread; all if not given.
    """
    passages = help_passages()
    if limit is not None and limit < len(passages):
        passages = [passages[i * len(passages) // limit] for i in range(limit)]
    # Whole topics are held out: passages of one topic say too much about each other.
    topics = sorted({passage.topic for passage in passages})
    unseen = set(topics[::8])
    seen = [p.text for p in passages if p.topic not in unseen]
    return seen, [p.text for p in passages if p.topic in unseen]
