"""A whole encoder with weights of low rank beside dense ones, and beside plain pairs of factors.

What low rank computes is something else by its nature, and is checked loosely: that it is the same
model at all. Ranks are those of the FlashSVD experiments: 256 for query, key and value together and
for both weights of the feed-forward part, 208 for the output projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import baselines, ours
from ..engines import Engine, Setup
from ..models import race_models
from ..results import Row
from ..runner import Options
from ..workloads import WORKLOADS as ALL
from ..workloads import Workload, weight_sharing_copy
from .e2e import TOLERANCE

NAME = "e2e_lowrank"
ABOUT = "a whole encoder of low rank beside HF SDPA, HF SDPA with factor pairs, and filbert dense"
REFERENCE = "HF SDPA"
RATE = ("tokens_per_s", "tokens/s", 1.0)
WORKLOADS = dict(ALL)
DEFAULT = ("bert-base-512", "bert-base-128")
OUT, OTHERS = 208, 256
#: positions of each text in a chunk; must divide the longest text
CHUNK = 64


def _engine(model: nn.Module) -> Engine:
    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden

    return Engine(forward)


def _pair(linear: nn.Linear, rank: int) -> nn.Sequential:
    u, s, v = torch.svd_lowrank(linear.weight.detach().float(), rank, niter=1)
    made = nn.Sequential(
        nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features)
    )
    made[0].weight.data, made[1].weight.data = (v * s).T.contiguous(), u.contiguous()
    made[1].bias = linear.bias
    return made.to(linear.weight)


def factor_pairs(setup: Setup) -> Engine:
    """What a factorized checkpoint is without kernels: two linear layers for each."""
    model = copy.deepcopy(baselines.hugging_face(setup, "sdpa"))
    for layer in model.encoder.layer:
        own = layer.attention.self
        for name in ("query", "key", "value"):
            setattr(own, name, _pair(getattr(own, name), OTHERS))
        layer.attention.output.dense = _pair(layer.attention.output.dense, OUT)
        layer.intermediate.dense = _pair(layer.intermediate.dense, OTHERS)
        layer.output.dense = _pair(layer.output.dense, OTHERS)
    return _engine(model)


def low_rank(bits: int | None = None) -> Callable[[Setup], Engine]:
    """filbert.factorize with the same ranks."""

    def build(setup: Setup) -> Engine:
        setup.model.set_attn_implementation("sdpa")
        model = copy.deepcopy(setup.model).to(setup.dtype)
        ranks = {r"re:attention\.output": OUT, "re:.*": OTHERS}
        return _engine(ours._public("factorize")(model, ranks=ranks, factor_bits=bits))

    return build


def in_chunks(build: Callable[[Setup], Engine]) -> Callable[[Setup], Engine]:
    """The same with transformers' ``chunk_size_feed_forward``: the wide activation is that of a few
    rows of each text only."""

    def built(setup: Setup) -> Engine:
        model = copy.deepcopy(setup.model)
        for layer in model.encoder.layer:
            layer.chunk_size_feed_forward = CHUNK
        return build(replace(setup, model=model))

    return built


class _Embedded(nn.Module):
    """Embeddings that were made before: what is measured is the encoder."""

    def __init__(self, own: nn.Module, workload: Workload) -> None:
        super().__init__()
        self.own = own
        with torch.inference_mode():
            ids = [batch.input_ids for batch in workload.batches()]
            self.made = {batch.shape: own(input_ids=batch) for batch in ids}

    def forward(self, input_ids: Tensor, **others: object) -> Tensor:
        made = self.made.get(input_ids.shape)
        return self.own(input_ids=input_ids, **others) if made is None else made


def encoder_alone(build: Callable[[Setup], Engine]) -> Callable[[Setup], Engine]:
    """The same without the embeddings' own memory, which are no part of the encoder."""

    def built(setup: Setup) -> Engine:
        model = weight_sharing_copy(setup.model)
        model.embeddings = _Embedded(model.embeddings, setup.workload)
        return build(replace(setup, model=model))

    return built


LOW_RANK = {
    "HF SDPA, factor pairs": factor_pairs,
    "filbert, low rank": low_rank(),
    "filbert, low rank of 8 bits": low_rank(8),
}
BUILDERS = {REFERENCE: baselines.hf_sdpa, "filbert": ours.filbert, **LOW_RANK}
#: whose memory is measured
CHUNKED = {
    "HF SDPA, in chunks": in_chunks(baselines.hf_sdpa),
    "HF SDPA, factor pairs in chunks": in_chunks(factor_pairs),
}
MEMORY = {name: encoder_alone(build) for name, build in {**BUILDERS, **CHUNKED}.items()}
EXEMPT = frozenset({*LOW_RANK, "HF SDPA, factor pairs in chunks"})


def run(options: Options) -> list[Row]:
    """Checks and times every contestant on every workload asked for."""
    return race_models(
        options, WORKLOADS, lambda dtype, workload: BUILDERS,
        reference=REFERENCE, tolerance=TOLERANCE, default=DEFAULT, exempt=EXEMPT,
    )  # fmt: skip
