"""One embedding per text, computed on packed rows from the first layer to the pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..packed.batch import PackedBatch
from .hugging_face.holders import is_sentence_transformer, module_of, recipe_of
from .in_place import owner_of
from .swap import EncoderReached, SwappedEncoder, stop_at_encoder

__all__ = ["embed"]


def embed(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    **embedding_kwargs: Any,
) -> Any:
    """Runs a converted model's encoder on packed rows and pools them, without ever unpacking.

    The model's own code makes the embeddings, so position and token-type rules, projections and
    extra inputs are its own; a task head is not run. With ``pooling="cls"`` the last layer computes
    only the rows that are needed. No gradient is recorded, and what is returned is an ordinary
    tensor: it may be what a trained module is fed with.

    Args:
        model: a model given to :func:`filbert.convert`, with one encoder, with a task head or not;
            or a SentenceTransformer or pipeline that holds one.
        input_ids: ``[B, S]`` integers.
        attention_mask: ``[B, S]``, nonzero keeps the token; all are kept if not given. Padding may
            be on either side.
        pooling: ``"mean"`` over the kept tokens; ``"cls"``, the first kept token; ``"none"``. If
            not given, what a SentenceTransformer says itself, and otherwise ``"mean"``.
        normalize: scale each embedding to length 1. A zero vector stays zero. If not given, what a
            SentenceTransformer does itself, and otherwise False.
        embedding_kwargs: further inputs of the model, such as ``token_type_ids``.

    Returns:
        ``[B, N]`` in the model's dtype, zeros for a text without tokens. With ``"none"`` the packed
        rows ``[T, N]`` and their :class:`~filbert.packed.batch.PackedBatch`.

    Raises:
        TypeError: no model, or no tensor of ids.
        ValueError: a model without exactly one packed encoder, shapes that do not fit, an unknown
            ``pooling``, or a SentenceTransformer that does more than to pool and normalize.
        RuntimeError: as in calling the model.
    """
    model = module_of(model, "embed")
    recipe = recipe_of(model) if pooling is None or normalize is None else {}
    pooling = recipe["pooling"] if pooling is None else pooling
    normalize = recipe["normalize"] if normalize is None else normalize
    if pooling not in ("mean", "cls", "none"):
        raise ValueError(f"pooling: got {pooling!r}, need 'mean', 'cls' or 'none'")
    encoders = {m: n for n, m in model.named_modules() if isinstance(m, SwappedEncoder)}
    if len(encoders) != 1:
        raise ValueError(
            f"model: got {type(model).__name__} with {len(encoders)} packed encoders, need one; "
            "try filbert.convert(model)"
        )
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids: got {type(input_ids).__name__}, need a tensor [B, S]; try what the "
            "model's tokenizer gives for return_tensors='pt'"
        )
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, need "
            f"{tuple(input_ids.shape)} like input_ids"
        )
    if is_sentence_transformer(model):  # what it holds takes ids
        (name,) = encoders.values()
        model = owner_of(model, name) or model
    with torch.no_grad():
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


def _embeddings(model: Any, **inputs: Any) -> tuple[SwappedEncoder, Tensor]:
    """Runs ``model`` up to its encoder."""
    token = stop_at_encoder.set(True)
    try:
        model(**inputs)
    except EncoderReached as reached:
        return reached.encoder, reached.hidden_states
    finally:
        stop_at_encoder.reset(token)
    raise ValueError(f"{type(model).__name__}: the model never called its packed encoder")
