"""What makes a checkpoint unfit for :func:`filbert.binarize`, and what its config says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .latent import LatentBert, Linears
from .student import BinarizedBert, BinarizedBertConfig

__all__ = [
    "clean", "no_state_dict", "other_architecture", "other_layout", "own_config", "settings_of",
    "unfit_sizes", "unknown_entries", "unsupported", "unwrapped",
]  # fmt: skip

_OWN = "filbert-binarized-bert"
#: entries that no forward pass reads
_UNREAD = (
    r"\.(weight_clip_val|embed_clip_val|act_clip_val|scale|gate|position_ids|token_type_ids)$"
    r"|\.move_[qkv]\.bias$|\.clip_(query|key|value|attn)$|\.input_clip_val$|^cls\."
)


def unwrapped(source: Any) -> Any:
    """The model inside of torch.compile's and DataParallel's wrappers."""
    while isinstance(source, nn.Module):
        inner = getattr(source, "_orig_mod", None)
        if inner is None and type(source).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = source.module
        if not isinstance(inner, nn.Module):
            break
        source = inner
    return source


def clean(name: str) -> str:
    """An entry's name without wrappers' and the head's prefixes, and with today's endings."""
    name = name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("bert.")
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def settings_of(config: Any) -> dict[str, Any]:
    """A config as a dict, whether it is one, an object, or None."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if not hasattr(config, "__dict__"):
        raise ValueError(
            f"config: got a {type(config).__name__}, need a dict or a config object; try "
            "json.loads of the text of config.json"
        )
    return dict(vars(config))


def own_config(source: Any, config: Any) -> BinarizedBertConfig | None:
    """The config of filbert's own eager model, from it or from what was saved with it.

    Raises:
        ValueError: a saved one of another version, or with other fields.
    """
    if isinstance(source, BinarizedBert):
        return source.config
    for given in (config, getattr(source, "config", None)):
        if isinstance(given, BinarizedBertConfig):
            return given
        if isinstance(given, Mapping) and given.get("model_type") == _OWN:
            return BinarizedBertConfig.from_dict(given)
    return None


def no_state_dict(source: Any) -> list[str]:
    """Why ``source`` is neither a model nor a state dict."""
    if isinstance(source, nn.Module):
        return []
    if not isinstance(source, Mapping):
        kind = type(source).__name__
        return [
            f"model: got a {kind}, need a model or a state dict; load it first: torch.load(...) or "
            "BinarizedBert.load(folder)"
        ]
    nested = [
        name for name, value in source.items()
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
    ]  # fmt: skip
    inside = [f"the entry {name!r} is itself a state dict; pass that" for name in nested]
    inside += [
        f"{name!r}: got {type(name).__name__} as name, need str; try model.state_dict()"
        for name in source if not isinstance(name, str)
    ]  # fmt: skip
    odd = [n for n, v in source.items() if not isinstance(v, Tensor) and n not in nested]
    if odd and not inside:
        kinds = sorted({type(source[name]).__name__ for name in odd})
        inside.append(
            f"{', '.join(map(str, odd[:3]))}: got {', '.join(kinds)}, need tensors only; try "
            "torch.from_numpy for arrays, and leave out what is no weight"
        )
    return inside


def other_layout(names: list[str]) -> list[str]:
    """Why entries of these names cannot be read, whatever the scheme."""
    reasons = []
    if any(re.search(r"encoder\.layers\.\d+\.(self_attn|linear1)\.", n) for n in names):
        reasons.append(
            "a Paddle layout: its binarization has a scale for each input channel, which cannot be "
            "taken out of a sum of bits, and its attention keeps a softmax of which the sign is 1 "
            "everywhere; need a PyTorch checkpoint"
        )
    if any(re.search(r"\.(lora_[qkv]|[qk]_[pm]|v_p)\.", n) for n in names):
        reasons.append(
            "BiPFT: it adds low-rank float terms to the scores and the context, which bits cannot "
            "hold; need BiBERT, BiT or BinaryBERT"
        )
    return reasons


def other_architecture(settings: Mapping[str, Any]) -> list[str]:
    """Why a model of this config is no BERT encoder."""
    reasons = []
    kind = settings.get("model_type") or "bert"
    if kind not in ("bert", _OWN):
        reasons.append(
            f"model_type: got {kind!r}, need 'bert'; others count positions or add their tables in "
            "another way"
        )
    if settings.get("is_decoder") or settings.get("add_cross_attention"):
        reasons.append("is_decoder: got a decoder, need an encoder")
    positions = settings.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        reasons.append(f"position_embedding_type: got {positions!r}, need 'absolute'")
    return reasons


def unsupported(options: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Why there are no operators for these choices."""
    reasons = []
    need = (2, 4, 8) if options["scheme"] == "binarybert" else (1,)
    if options["bits"] is not None and options["bits"] not in need:
        reasons.append(
            f"activations: got {options['bits']!r} bits, {options['scheme']!r} needs one of {need}"
        )
    heads = settings.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        reasons.append(
            f"num_attention_heads: got {'none' if heads is None else repr(heads)}, need "
            "config={'num_attention_heads': ...}, which weights do not tell"
        )
    if options["activation"] not in ("gelu", "relu"):
        reasons.append(f"hidden_act: got {options['activation']!r}, need 'gelu' or 'relu'")
    return reasons


def unknown_entries(left: set[str]) -> tuple[list[str], list[str]]:
    """Reasons and notes about entries that were not read."""
    odd = sorted(name for name in left if not re.search(_UNREAD, name))
    inner = [name for name in odd if name.startswith(("encoder.", "embeddings."))]
    outer = [name for name in odd if name not in inner]
    reasons, notes = [], []
    if inner:
        reasons.append(
            f"{len(inner)} entries that no scheme has: {', '.join(inner[:4])}; need a BERT "
            "encoder's; try another scheme=, or leave them out if its code does not read them"
        )
    if outer:
        notes.append(f"{len(outer)} entries are not part of the model: {', '.join(outer[:4])}")
    if any(name.startswith("cls.") for name in left):
        notes.append("the head of masked words or next sentences, cls.*, is dropped")
    return reasons, notes


def unfit_sizes(latent: LatentBert, hidden: int) -> list[str]:
    """Why parts do not fit together, or have no operators."""
    width = latent.layers[0].query[0].weight.shape[0]
    dim, rest = divmod(width, latent.heads)
    if latent.bits > 1:  # rounded softmax, in PyTorch, at any size
        unit, most = 1, width
        need = "a whole number"
    else:
        unit, most = 32, 128
        need = f"a multiple of {unit} up to {most}"
    reasons = []
    if rest or dim % unit or not 0 < dim <= most:
        reasons.append(
            f"heads: got {latent.heads} of {width / latent.heads:g} values, need {need} each; try "
            "num_attention_heads in config="
        )
    checks: list[tuple[str, Tensor, tuple[int, ...]]] = []

    def linears(parts: Linears, shape: tuple[int, int]) -> None:
        checks.extend((f"{one.name}.weight", one.weight, shape) for one in parts)

    def norm(name: str, pair: tuple[Tensor, Tensor]) -> None:
        for end, t in zip(("weight", "bias"), pair, strict=True):
            checks.append((f"{name}.LayerNorm.{end}", t, (hidden,)))

    for index, layer in enumerate(latent.layers):
        inner = layer.up[0].weight.shape[0]
        for side in (layer.query, layer.key, layer.value):
            linears(side, (width, hidden))
        linears(layer.out, (hidden, width))
        linears(layer.up, (inner, hidden))
        linears(layer.down, (hidden, inner))
        norm(f"encoder.layer.{index}.attention.output", layer.attn_norm)
        norm(f"encoder.layer.{index}.output", layer.ffn_norm)
    if latent.pooler is not None:
        linears(latent.pooler, (hidden, hidden))
    if latent.classifier is not None:
        weight, bias = latent.classifier
        checks.append(("classifier.weight", weight, (weight.shape[0], hidden)))
        checks.append(("classifier.bias", bias, (weight.shape[0],)))
    norm("embeddings", latent.norm)
    for index, table in enumerate(latent.words):
        name = "embeddings.word_embeddings" + (f"_{index + 1}" if len(latent.words) > 1 else "")
        checks.append((f"{name}.weight", table, (latent.words[0].shape[0], hidden)))
    for name, table in (("position", latent.position), ("token_type", latent.token_type)):
        size = (table.shape[0], hidden)
        checks.append((f"embeddings.{name}_embeddings.weight", table, size))
    reasons += [
        f"{name}: got {tuple(t.shape)}, need {need}"
        for name, t, need in checks
        if t.shape != torch.Size(need)
    ]
    return reasons
