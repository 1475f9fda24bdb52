"""One embedding per text, computed on packed rows from the first layer to the pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .packing import PackedBatch
from .swap import EncoderReached, SwappedEncoder, stop_at_encoder

__all__ = ["embed"]


def embed(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pooling: str = "mean",
    normalize: bool = False,
    **embedding_kwargs: Any,
) -> Any:
    """Runs a converted model's encoder on packed rows and pools them, without ever unpacking.

    The model's own code makes the embeddings, so position and token-type rules, projections and
    extra inputs are its own; a task head is not run. With ``pooling="cls"`` the last layer computes
    only the rows that are needed.

    Args:
        model: a model given to :func:`filbert.convert`, with one encoder, with a task head or not.
        input_ids: ``[B, S]`` integers.
        attention_mask: ``[B, S]``, nonzero keeps the token; all are kept if not given. Padding may
            be on either side.
        pooling: ``"mean"`` over the kept tokens; ``"cls"``, the first kept token; ``"none"``.
        normalize: scale each embedding to length 1. A zero vector stays zero.
        embedding_kwargs: further inputs of the model, such as ``token_type_ids``.

    Returns:
        ``[B, N]`` in the model's dtype, zeros for a text without tokens. With ``"none"`` the packed
        rows ``[T, N]`` and their :class:`~filbert.packing.PackedBatch`.

    Raises:
        ValueError: a model without exactly one packed encoder, shapes that do not fit, or an
            unknown ``pooling``.
        RuntimeError: as in calling the model.
    """
    if pooling not in ("mean", "cls", "none"):
        raise ValueError(f"pooling: got {pooling!r}, need 'mean', 'cls' or 'none'")
    encoders = {m for m in model.modules() if isinstance(m, SwappedEncoder)}
    if len(encoders) != 1:
        raise ValueError(
            f"model: got {type(model).__name__} with {len(encoders)} packed encoders, need one; "
            "try filbert.convert(model)"
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, need "
            f"{tuple(input_ids.shape)} like input_ids"
        )
    with torch.inference_mode():
        encoder, hidden_states = _embeddings(
            model, input_ids=input_ids, attention_mask=attention_mask, **embedding_kwargs
        )
        if attention_mask is None:
            batch = PackedBatch.full(input_ids.shape[0], input_ids.shape[1], input_ids.device)
        else:
            batch = PackedBatch.from_mask(attention_mask)
        rows = encoder.pack(hidden_states, batch)
        if pooling == "cls":
            pooled = encoder.forward_packed(rows, batch, pooled="cls")
        else:
            rows = encoder.forward_packed(rows, batch)
            pooled = rows if pooling == "none" else batch.pool(rows, pooling)
        if normalize:
            pooled = unit_length(pooled)
        pooled = pooled.to(hidden_states.dtype)
    return (pooled, batch) if pooling == "none" else pooled


def unit_length(pooled: Tensor) -> Tensor:
    """``[B, N]`` scaled to length 1, in float32, whose smallest numbers hold the bound that keeps a
    zero vector zero."""
    return F.normalize(pooled.float(), dim=-1)


def _embeddings(model: nn.Module, **inputs: Any) -> tuple[SwappedEncoder, Tensor]:
    """Runs ``model`` up to its encoder."""
    token = stop_at_encoder.set(True)
    try:
        model(**inputs)
    except EncoderReached as reached:
        return reached.encoder, reached.hidden_states
    finally:
        stop_at_encoder.reset(token)
    raise ValueError(f"{type(model).__name__}: the model never called its packed encoder")
