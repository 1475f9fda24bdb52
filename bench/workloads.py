"""What is computed: models, batches of token ids, and where they come from.

The synthetic workloads are ByteTransformer's: BERT-base, batch 16, lengths uniform between 0.2 and
1.0 of the maximum, so 0.6 of it on average. The real one is the text that the demo embeds.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .timing import Unavailable


@dataclass(frozen=True)
class Geometry:
    """The shape of a BERT-type encoder with random weights."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30522


GEOMETRIES = {
    "bert-base": Geometry(12, 768, 12, 3072),
    "tiny": Geometry(2, 64, 2, 128, vocabulary=1000),
}
#: the real model: all-MiniLM-L6-v2 (6 layers, hidden 384, 12 heads of 32)
MINILM = "minilm"


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences. ``order`` holds each sequence's number in the workload."""

    input_ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] int64, 1 = a real token
    lengths: tuple[int, ...]
    order: tuple[int, ...]

    def to(self, device: str) -> Batch:
        ids, mask = self.input_ids.to(device), self.attention_mask.to(device)
        return Batch(ids, mask, self.lengths, self.order)


def pad(sequences: Sequence[Tensor], order: Sequence[int], seq_len: int | None = None) -> Batch:
    """One batch from 1-D id tensors, padded to the longest or to ``seq_len``."""
    lengths = tuple(len(ids) for ids in sequences)
    size = (len(sequences), seq_len or max(lengths))
    ids, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : lengths[row]] = sequence
        mask[row, : lengths[row]] = 1
    return Batch(ids, mask, lengths, tuple(order))


@dataclass(frozen=True)
class Workload:
    """A list of sequences, and how a user would batch them."""

    name: str
    model: str
    sequences: tuple[Tensor, ...]
    batch_size: int
    #: padded length of every batch; None pads each to its own longest
    seq_len: int | None
    #: True: the answer is one mean vector per sequence, not one per token
    pooled: bool = False

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)

    def batches(self, device: str = "cpu") -> list[Batch]:
        """The sequences in their own order."""
        return self._cut(range(len(self.sequences)), self.batch_size, self.seq_len, device)

    def sorted_batches(self, device: str = "cpu", buckets: int = 4) -> list[Batch]:
        """The sequences sorted by length and cut into batches, each padded to its own longest.

        A workload of one batch is cut into ``buckets`` of them, or sorting would save nothing.
        """
        order = sorted(range(len(self.sequences)), key=lambda i: len(self.sequences[i]))
        size = self.batch_size
        if len(order) <= size:
            size = max(1, -(-len(order) // buckets))
        return self._cut(order, size, None, device)

    def _cut(
        self, order: Sequence[int], size: int, seq_len: int | None, device: str
    ) -> list[Batch]:
        return [
            pad([self.sequences[i] for i in part], part, seq_len).to(device)
            for part in (order[at : at + size] for at in range(0, len(order), size))
        ]


def uniform_lengths(batch: int, maximum: int, least: float = 0.2, seed: int = 0) -> list[int]:
    """``batch`` lengths spread evenly over ``[least * maximum, maximum]``, in shuffled order.

    Evenly spaced instead of drawn: with 16 sequences a draw's mean misses 0.6 by up to 0.1, and
    every speed-up would inherit that luck.
    """
    if batch == 1:
        return [maximum]
    low = max(1.0, least * maximum)
    lengths = [round(low + (maximum - low) * i / (batch - 1)) for i in range(batch)]
    random.Random(seed).shuffle(lengths)
    return lengths


def synthetic(
    name: str, model: str, lengths: Sequence[int], seq_len: int, pooled: bool = False
) -> Workload:
    """One batch of random ids with the given lengths."""
    vocabulary = GEOMETRIES[model].vocabulary if model in GEOMETRIES else 30522
    generator = torch.Generator().manual_seed(1)
    sequences = tuple(
        torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths
    )
    return Workload(name, model, sequences, len(lengths), seq_len, pooled)


def topics(passages: int = 128, batch: int = 32) -> Workload:
    """Passages of the demo's text, evenly spaced over it and in its order, MiniLM's token ids."""
    from transformers import AutoTokenizer

    texts = [p.text for p in _corpus().help_passages()]
    step = max(1, len(texts) // passages)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    ids = tokenizer(texts[::step][:passages], truncation=True, max_length=256)["input_ids"]
    return Workload(
        "minilm-topics", MINILM, tuple(torch.tensor(row) for row in ids), batch, None, pooled=True
    )


def _bytetransformer(maximum: int, batch: int = 16) -> Callable[[], Workload]:
    name = f"bert-base-{maximum}" + ("" if batch == 16 else f"-b{batch}")
    lengths = uniform_lengths(batch, maximum)
    return lambda: synthetic(name, "bert-base", lengths, maximum)


#: end-to-end workloads by name
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "bert-base-64": _bytetransformer(64),
    "bert-base-128": _bytetransformer(128),
    "bert-base-256": _bytetransformer(256),
    "bert-base-384": _bytetransformer(384),
    "bert-base-512": _bytetransformer(512),
    "bert-base-512-b8": _bytetransformer(512, batch=8),
    "minilm-topics": topics,
    "query-bert-base": lambda: synthetic("query-bert-base", "bert-base", [32], 32),
    "query-minilm": lambda: synthetic("query-minilm", MINILM, [32], 32, pooled=True),
    "tiny": lambda: synthetic("tiny", "tiny", [7, 20, 1, 13], 20),
}
#: what runs when no workload is named
DEFAULT = ("bert-base-128", "bert-base-256", "bert-base-512-b8", "minilm-topics", "query-*")


def _corpus() -> Any:
    try:
        from filbert.app import corpus
    except ImportError as error:
        raise Unavailable(f"filbert.app.corpus cannot be imported: {error}") from error
    return corpus


def minilm_folder() -> str:
    """The folder of the all-MiniLM-L6-v2 weights inside the package that ships them."""
    try:
        return str(_corpus().minilm_folder())
    except FileNotFoundError as error:
        raise Unavailable(str(error)) from error


@lru_cache(maxsize=1)  # one at a time: a BERT-base is 440 MB
def model(name: str) -> Any:
    """The float32 Hugging Face base model of that name, in evaluation mode, without a pooler."""
    if name == MINILM:
        from transformers import AutoModel

        loaded = AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False)
        return loaded.float().eval().requires_grad_(False)
    from transformers import BertConfig, BertModel

    shape = GEOMETRIES[name]
    config = BertConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        # 0.02 at BERT-base, and activations of the same size at any other width.
        initializer_range=0.55 / shape.hidden**0.5,
    )
    torch.manual_seed(0)
    made = BertModel(config, add_pooling_layer=False)
    _make_lifelike(made)
    return made.eval().requires_grad_(False)


def _make_lifelike(bert: Any) -> None:
    """Gives random weights the two properties of trained ones that the check needs.

    Fresh BERT weights make attention all but uniform and every bias zero: a kernel that confuses
    keys or forgets a bias would pass. Larger query and key weights sharpen the softmax, and no
    bias, gamma or beta is left at its neutral value.
    """
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                parameter.mul_(2.5)
            elif name.endswith("LayerNorm.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)


def weight_sharing_copy(bert: Any) -> Any:
    """A second model over the same weight storage, with a config of its own.

    Each parameter is a new object: ``copy.to(dtype)`` replaces a parameter's data in place, and the
    original must not change with it.
    """
    shared: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.data, requires_grad=False) for p in bert.parameters()
    }
    return copy.deepcopy(bert, shared)
