"""What turns a Hugging Face model and a list of batches into answers: the common seam.

Every contestant of the end-to-end and memory cases is an :class:`Engine`. It is built once (that
is not timed), then given batches; what it does with them, sorting included, is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .timing import Contestant
from .workloads import Batch, Workload

#: (input_ids [B, S], attention_mask [B, S]) -> hidden states [B, S, N]
Forward = Callable[[Tensor, Tensor], Tensor]
#: (input_ids [B, S], attention_mask [B, S]) -> one vector per sequence [B, N]
Embed = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setup:
    """What every builder is given."""

    #: float32, evaluation mode, on ``device``; not to be changed, see ``weight_sharing_copy``
    model: Any
    workload: Workload
    dtype: torch.dtype
    device: str = "cpu"
    threads: int = 1
    #: seconds after which a compiler is given up
    compile_limit_s: float = 240.0


@dataclass
class Engine:
    """A model made ready by one runtime."""

    forward: Forward | None = None
    #: where set, and where the workload wants one vector per sequence, used in place of ``forward``
    embed: Embed | None = None
    #: makes the batches from the workload; part of what is timed
    batches: Callable[[Workload, str], list[Batch]] | None = None
    #: the batches it is given stay on the CPU, as a tokenizer makes them
    host_inputs: bool = False
    note: str = ""
    #: kept alive as long as the engine: temporary files, sessions
    holds: list[Any] = field(default_factory=list)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens, as sentence-transformers does it on padded output."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1e-9)


def answers(engine: Engine, workload: Workload, batches: list[Batch]) -> list[Tensor]:
    """Runs the batches; a ``[B, S, N]`` (or pooled, ``[B, N]``) tensor for each."""
    out = []
    with torch.inference_mode():
        for batch in batches:
            if workload.pooled and engine.embed is not None:
                out.append(engine.embed(batch.input_ids, batch.attention_mask))
                continue
            assert engine.forward is not None
            hidden = engine.forward(batch.input_ids, batch.attention_mask)
            out.append(mean_pool(hidden, batch.attention_mask) if workload.pooled else hidden)
    return out


def in_order(workload: Workload, batches: list[Batch], outputs: list[Tensor]) -> Tensor:
    """What the check compares: rows of real tokens ``[T, N]``, or vectors ``[sequences, N]``,
    in the order of the workload whatever the batches were."""
    pieces: dict[int, Tensor] = {}
    for batch, output in zip(batches, outputs, strict=True):
        for row, (number, length) in enumerate(zip(batch.order, batch.lengths, strict=True)):
            pieces[number] = output[row : row + 1] if workload.pooled else output[row, :length]
    return torch.cat([pieces[number] for number in sorted(pieces)]).float()


def contestant(name: str, engine: Engine, setup: Setup) -> Contestant:
    """The engine as something that can be raced on the workload of ``setup``."""
    workload, device = setup.workload, setup.device
    prepared = None
    if engine.batches is None:
        prepared = workload.batches("cpu" if engine.host_inputs else device)

    def run() -> tuple[list[Batch], list[Tensor]]:
        batches = prepared if prepared is not None else engine.batches(workload, device)  # type: ignore[misc]
        return batches, answers(engine, workload, batches)

    return Contestant(
        name,
        run,
        lambda value: in_order(workload, *value),
        note=engine.note,
    )


def reference_answer(setup: Setup) -> Tensor:
    """The yardstick of the check: each sequence alone, unpadded, float32, Hugging Face's SDPA.

    No padding and no mask enter it, so that it also catches a mistake that every padded contestant
    would share.
    """
    model, workload = setup.model, setup.workload
    model.set_attn_implementation("sdpa")
    pieces = []
    with torch.inference_mode():
        for ids in workload.sequences:
            hidden = model(input_ids=ids[None].to(setup.device)).last_hidden_state[0]
            pieces.append(hidden.mean(0, keepdim=True) if workload.pooled else hidden)
    return torch.cat(pieces).float()
