"""What holds a model and is handed over in its place: pipelines, SentenceTransformers, wrappers."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

__all__ = ["is_sentence_transformer", "module_of", "recipe_of"]

#: what may follow the Transformer and the Pooling of a SentenceTransformer that does no more than
#: filbert.embed can
_AFTER_POOLING = ("Normalize", "Dropout")


def module_of(model: Any, who: str) -> nn.Module:
    """``model``, or the module that it keeps as its ``model``, as a pipeline does.

    Raises:
        TypeError: neither; the message says what to pass.
    """
    if isinstance(model, nn.Module):
        return model
    held = getattr(model, "model", None)
    if isinstance(held, nn.Module):
        return held
    if isinstance(model, (str, PathLike)):
        advice = f"filbert.{who}(AutoModel.from_pretrained({str(model)!r}).eval())"
        if who != "convert":
            advice = f"what filbert.convert(AutoModel.from_pretrained({str(model)!r}).eval()) gives"
    elif isinstance(model, type):
        advice = f"an instance: {model.__name__}(...) or {model.__name__}.from_pretrained(...)"
    else:
        advice = "the torch.nn.Module in it"
    raise TypeError(
        f"{who}: got {model!r:.60} ({type(model).__name__}), need a model (torch.nn.Module), or a "
        f"pipeline that holds one; try {advice}"
    )


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether ``model`` is one of sentence-transformers' own, which take a dict of features."""
    return any(c.__module__.startswith("sentence_transformers.") for c in type(model).__mro__)


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """``pooling`` and ``normalize`` as a SentenceTransformer's own modules do them after its
    Transformer; the mean as it is for any other model.

    Raises:
        ValueError: it pools in another way, or does more than that.
    """
    if not is_sentence_transformer(model):
        return {"pooling": "mean", "normalize": False}
    parts = list(model.children())
    kinds = [type(part).__name__ for part in parts]
    modes = [_pooling_of(part) for part in parts if type(part).__name__ == "Pooling"]
    width = getattr(model, "truncate_dim", None)
    known = kinds[1:2] == ["Pooling"] and not set(kinds[2:]) - set(_AFTER_POOLING)
    if not known or modes not in (["mean"], ["cls"]) or width is not None:
        raise ValueError(
            f"model: got a {type(model).__name__} of {', '.join(kinds)} (pooling "
            f"{', '.join(modes) or 'none'}, truncate_dim {width}), need a Transformer, a Pooling "
            "of the mean or the first token, then at most a Normalize; try model.encode, which "
            "runs the converted transformer too, or pooling= and normalize= as you want them"
        )
    return {"pooling": modes[0], "normalize": "Normalize" in kinds}


def _pooling_of(part: nn.Module) -> str:
    """The mode in a word, from sentence-transformers before and after version 6."""
    mode = getattr(part, "pooling_mode", None)
    if mode is None:
        get = getattr(part, "get_pooling_mode_str", lambda: "unknown")
        mode = get()
    if not getattr(part, "include_prompt", True):
        mode = f"{mode} without the prompt"
    return mode if isinstance(mode, str) else "+".join(map(str, mode))
