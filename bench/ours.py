"""filbert as a contestant: never on its reference code, whose speed says nothing."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from .baselines import first_line
from .engines import Engine, Setup
from .timing import Unavailable


def compiled_filbert() -> Any:
    """The package, if its kernels are loaded.

    Raises:
        Unavailable: it cannot be imported, or would run its reference code.
    """
    try:
        import filbert
        from filbert import _load
    except ImportError as error:
        raise Unavailable(f"filbert cannot be imported: {first_line(error)}") from error
    if not _load.have_ops():
        raise Unavailable(
            f"the compiled library is missing, only the reference code would run: "
            f"{_load.missing.get('ops', 'no reason kept')}"
        )
    return filbert


def _public(name: str) -> Any:
    """``filbert.<name>``."""
    try:
        return getattr(compiled_filbert(), name)
    except AttributeError as error:
        raise Unavailable(f"this filbert has no {name}(): {first_line(error)}") from error


def _converted(setup: Setup) -> Any:
    convert = _public("convert")
    setup.model.set_attn_implementation("sdpa")
    try:
        return convert(copy.deepcopy(setup.model).to(setup.dtype))
    except ValueError as error:
        raise Unavailable(f"convert() refused: {first_line(error)}") from error


def filbert(setup: Setup) -> Engine:
    """The converted model called like the model it was: padded in, padded out."""
    model = _converted(setup)

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return Engine(forward)


def bucket(tokens: int) -> int:
    """A graph's size for so many tokens, among those that a user without their number would take:
    32, 64, and multiples of 128."""
    return next((size for size in (32, 64) if tokens <= size), -(-tokens // 128) * 128)


def filbert_captured(setup: Setup) -> Engine:
    """``filbert.capture``: the converted model as CUDA graphs, one launch for a whole forward.

    It is given token ids on the CPU, as it asks for, so that copying them is timed.
    """
    if setup.device == "cpu":
        raise Unavailable("CUDA graphs need a GPU")
    capture = _public("capture")
    model = _converted(setup)
    batches = setup.workload.batches()
    sizes = sorted({bucket(sum(batch.lengths)) for batch in batches})
    try:
        runner = capture(model, sizes, max_sequences=max(len(b.lengths) for b in batches))
    except (ValueError, RuntimeError) as error:
        raise Unavailable(f"capture() refused: {first_line(error)}") from error

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return runner(input_ids, attention_mask, pooling="mean")

    note = f"graphs of {', '.join(map(str, sizes))} tokens"
    return Engine(runner, embed=embed, host_inputs=True, note=note)


def filbert_embed(setup: Setup) -> Engine:
    """``filbert.embed``: embeddings and pooling on packed rows too, nothing is ever unpacked."""
    if not setup.workload.pooled:
        raise Unavailable("this workload asks for token vectors, not for pooled ones")
    model = _converted(setup)
    embed_fn = _public("embed")

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return embed_fn(model, input_ids, attention_mask=attention_mask, pooling="mean")

    return Engine(embed=embed)
