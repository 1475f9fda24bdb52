"""Reads the latent weights of BiBERT, BiT and BinaryBERT models, whoever trained them.

A checkpoint is recognised by entries that only its own code writes. Whatever is refused is said
with all reasons at once.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...conversion.in_place import ConvertError
from ...nn.binary.linear import SCHEMES
from .checkpoint_checks import (
    clean,
    no_state_dict,
    other_architecture,
    other_layout,
    own_config,
    settings_of,
    unfit_sizes,
    unknown_entries,
    unsupported,
    unwrapped,
)
from .checkpoint_reader import Reader
from .latent import LatentBert, LatentLayer
from .published_settings import FIXED_EPS, batch_dependence, unlike_the_weights, unread_right
from .student import BinarizedBertConfig

__all__ = ["read_checkpoint", "recognise"]

#: scheme -> a pattern of entries that only its published code, or filbert's own, writes
_FINGERPRINTS = {
    "bit": r"\.(query|key|dense)\.move\.bias$|\.move_[qkv]\.bias$",
    "bibert": r"\.(query|key|dense)\.(scale|act_clip_val)$|\.output\.gate$",
    "binarybert": r"\.(query|key|dense)(_[12])?\.input_clip_val$",
}
_ADVICE = (
    "train a student with filbert.compress.binarize (BinarizedBert.from_dense, then distil), or "
    "pass scheme= and trained=True for weights that were trained to be binary; weights of an "
    'ordinary BERT lose less with scheme="binarybert", activation_bits=8, and least in a grouped '
    "4-bit format, but none of that is measured to be good"
)


def recognise(names: Any) -> str | None:
    """The scheme whose fingerprint is among the entries' ``names``, or None."""
    for scheme, pattern in _FINGERPRINTS.items():
        if any(re.search(pattern, name) for name in names):
            return scheme
    return None


def read_checkpoint(
    source: nn.Module | Mapping[str, Any],
    *,
    scheme: str | None = None,
    config: Any = None,
    activation_bits: int | None = None,
    trained: bool = False,
    approximate: bool = False,
) -> LatentBert:
    """Latent weights and everything that decides what they mean.

    Args:
        source: a model, or a state dict with or without ``module.`` and ``bert.`` prefixes.
        scheme: where entries do not tell; see :func:`filbert.binarize`.
        config: a dict or config object, the model's own if not given: ``num_attention_heads``
            (needed), ``hidden_act``, ``architectures``, ``input_bits`` (needed for BinaryBERT),
            ``layer_norm_eps`` (BiBERT's), ``weight_layerwise``, ``embed_layerwise``,
            ``sym_quant_ffn_attn``. What else it says is checked, see
            :mod:`~filbert.compress.binarize.published_settings`. One of filbert's own models, or
            its ``config.json``, tells everything else, the scheme too.
        activation_bits: of BinaryBERT, where the config has no ``input_bits``.
        trained, approximate: see :func:`filbert.binarize`.

    Raises:
        ConvertError: with all reasons.
    """
    source = unwrapped(source)
    who = type(source).__name__ if isinstance(source, nn.Module) else "the state dict"
    if reasons := no_state_dict(source):
        raise ConvertError(f"{who} cannot be binarized", reasons, "nothing was changed")
    entries = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    stated = settings_of(getattr(source, "config", None))
    try:
        settings = stated if config is None else settings_of(config)
        own = own_config(source, config)
    except ValueError as error:
        raise ConvertError(f"{who} cannot be binarized", [str(error)], "see config=") from error
    if own is not None:
        settings = {**own.to_dict(), **settings}
    names = [clean(name) for name in entries]
    printed = recognise(names)
    found = printed if own is None else own.scheme
    reasons = other_layout(names)
    for given in (stated, settings):
        reasons += [r for r in other_architecture(given) if r not in reasons]
    if scheme is not None and scheme not in SCHEMES:
        reasons.append(f"scheme: got {scheme!r}, need one of {sorted(SCHEMES)}")
    if scheme is not None and found is not None and scheme != found:
        reasons.append(f"scheme: got {scheme!r}, but its entries are those of {found!r}")
    if own is not None and printed not in (None, own.scheme):
        reasons.append(f"config: got {own.scheme!r}, but the entries are those of {printed!r}")
    if found is None and not reasons:
        if scheme is None:
            reasons.append(
                "no entry says that it was trained to be binary, and no scheme= is given"
            )
        elif not trained:
            reasons.append(
                f"no entry says that it was trained to be binary; got scheme={scheme!r} without "
                "trained=True. One-bit weights of an ordinary BERT compute noise"
            )
    if reasons:
        raise ConvertError(f"{who} cannot be binarized", reasons, f"try: {_ADVICE}")
    chosen = str(scheme or found)
    options = _options(chosen, settings, own, printed, activation_bits)
    reasons = unsupported(options, settings)
    if own is None:
        reasons += unread_right(chosen, settings)
    trained_bits = settings.get("input_bits") if own is None else own.bits
    learned = own is not None or printed is not None
    if learned and trained_bits and activation_bits not in (None, trained_bits):
        reasons.append(
            f"activation_bits: got {activation_bits}, but it was trained with {trained_bits}; "
            "leave it out"
        )
    if options["bits"] is None:
        reasons.append(
            "input_bits: got none, need config={'input_bits': ...} of 2, 4 or 8, which weights do "
            "not tell"
        )
    if reasons:  # go on with what is sound, to find all reasons
        options["bits"] = 8 if chosen == "binarybert" else 1
    reader = Reader(entries, options, type(source).__name__)
    reader.reasons += reasons
    latent = _read(reader, settings)
    if options["published"] and chosen == "binarybert":
        depends = batch_dependence(options, reader.clipped)
        if approximate:
            latent.notes += [f"approximated: {why.partition('; need')[0]}" for why in depends]
        else:
            reader.reasons += depends
    if names := reader.uncalibrated:
        reader.reasons.append(
            f"{len(names)} scales, {names[0]} first: got exactly 1, which the published code takes "
            "for one that no batch has set, and sets at the first call; need a trained one; try "
            "calibrating the model with a first batch, and saving it after that"
        )
    unknown, notes = unknown_entries(set(reader.entries) - reader.used)
    if reader.reasons or unknown:
        reasons = reader.reasons + unknown
        raise ConvertError(f"{who} cannot be binarized", reasons, "nothing was changed")
    if own is None:
        latent.notes += _doubts(latent, settings, type(source).__name__)
    latent.notes += notes
    return latent


def _options(
    scheme: str,
    settings: dict[str, Any],
    own: BinarizedBertConfig | None,
    printed: str | None,
    activation_bits: int | None,
) -> dict[str, Any]:
    """What decides the meaning of weights; ``printed`` is the scheme of their fingerprint."""
    default = {"bibert": "gelu", "bit": "relu", "binarybert": "gelu"}[scheme]
    activation = settings.get("hidden_act") or default
    if own is None and printed == "bibert":
        activation = default  # its code has GELU, whatever its config says
    if activation == "gelu_python":
        activation = "gelu"
    published = own is None and printed is not None
    # BinaryBERT's code has the levels of a signed number, if told so also where none is negative.
    symmetric = scheme == "binarybert" and own is None and bool(settings.get("sym_quant_ffn_attn"))
    options = {
        "scheme": scheme, "activation": activation, "granularity": None, "rows": False,
        "ties": "zero", "score_ties": "below", "published": published, "symmetric": symmetric,
        "unsigned_inner": scheme == "bit" or (
            scheme == "binarybert" and activation == "relu" and not symmetric
        ),
        "eps": FIXED_EPS if published and scheme != "bibert" else settings.get("layer_norm_eps"),
    }  # fmt: skip
    bits = settings.get("input_bits")
    if own is not None:
        bits = own.bits
        options |= {
            "granularity": own.granularity, "rows": own.mode == "row", "ties": own.ties,
            "score_ties": own.score_ties,
            "unsigned_inner": own.hidden_act == "relu" and scheme != "bibert",
        }  # fmt: skip
    elif scheme != "bibert" and (layerwise := settings.get("weight_layerwise")) is not None:
        options["granularity"] = "tensor" if layerwise else "row"
    elif scheme == "binarybert" and published:
        options["granularity"] = "tensor"  # what its code does if it is told nothing
    if bits is None and not (published and scheme == "binarybert"):
        bits = 8 if scheme == "binarybert" else 1
    options["bits"] = bits if activation_bits is None else activation_bits
    return options


def _doubts(latent: LatentBert, settings: Mapping[str, Any], kind: str) -> list[str]:
    """How models of other code may differ from what was read."""
    notes = []
    told = " ".join([kind, *(settings.get("architectures") or [])])
    if latent.classifier is not None and latent.pooler is not None and latent.head == "pooled" and (
        not re.search("For(Sequence|Token)Classification|ForMultipleChoice", told)
    ):  # fmt: skip
        notes.append(
            "the classifier is taken to be one of texts, after the pooler; one of tokens needs "
            "config={'architectures': ['BertForTokenClassification'], ...}"
        )
    stated = settings.get("layer_norm_eps")
    if stated not in (None, latent.eps):
        notes.append(
            f"layer_norm_eps is {latent.eps:g}, as in the published code, and not {stated:g}"
        )
    return notes


def _read(reader: Reader, settings: dict[str, Any]) -> LatentBert:
    options, scheme = reader.options, reader.options["scheme"]
    known = len(reader.reasons)
    words = reader.table("embeddings.word_embeddings")
    hidden = words[0].shape[1]
    heads = settings.get("num_attention_heads") or 1  # refused if it is not given
    found = {int(m[1]) for n in reader.entries if (m := re.match(r"encoder\.layer\.(\d+)\.", n))}
    if not found or found != set(range(len(found))):
        reader.reasons.append(f"encoder.layer: got {sorted(found)[:4]}, need layers from 0 on")
    layers = [_read_layer(reader, f"encoder.layer.{index}") for index in range(len(found))]
    pooler = None
    if any(name.startswith("pooler.") for name in reader.entries):
        pooler = reader.linear("pooler.dense")
    classifier, head = None, "pooled"
    of_tokens = any("ForTokenClassification" in a for a in settings.get("architectures") or [])
    of_tokens |= "ForTokenClassification" in reader.kind
    kinds = (("classifier", "tokens" if of_tokens else "pooled"), ("qa_outputs", "tokens"))
    for name, kind in kinds:
        if f"{name}.weight" in reader.entries:
            classifier, head = (
                (reader.take(f"{name}.weight", 2), reader.take(f"{name}.bias", 1)),
                kind,
            )
    own_table = {"bibert": "row", "bit": "tensor", "binarybert": "none"}[scheme]
    latent = LatentBert(
        scheme=scheme, heads=heads, eps=float(options["eps"] or FIXED_EPS),
        activation=options["activation"], words=words, word_centre=own_table,
        word_granularity="tensor" if settings.get("embed_layerwise") else "row",
        position=reader.take("embeddings.position_embeddings.weight", 2),
        token_type=reader.take("embeddings.token_type_embeddings.weight", 2),
        norm=reader.norm("embeddings.LayerNorm"), layers=layers, pooler=pooler,
        classifier=classifier, head=head, bits=options["bits"],
        prob_levels=prob_levels(options), ties=options["ties"],
        score_ties=options["score_ties"],
    )  # fmt: skip
    if len(reader.reasons) == known:  # else there are placeholders among them
        reader.reasons += unfit_sizes(latent, hidden) + unlike_the_weights(latent, settings)
    if scheme == "binarybert" and options["published"] and not options["symmetric"]:
        latent.notes.append(
            "levels of probabilities count from 0; the published code counts from the least one of "
            "a batch, which is 0 wherever a text is padded"
        )
    return latent


def prob_levels(options: Mapping[str, Any]) -> int:
    """The largest code of a probability."""
    return 2 ** (options["bits"] - options["symmetric"]) - 1


def _read_layer(reader: Reader, name: str) -> LatentLayer:
    attention = f"{name}.attention.self"
    options = reader.options
    scales: tuple[float | None, ...] = (None, None, None, None)
    clips: tuple[float, ...] | None = None
    if options["scheme"] != "bibert" and not options["rows"]:
        read = [reader.scale(f"{attention}.clip_{n}") for n in ("query", "key", "value", "attn")]
        scales = tuple(scale for scale, _ in read)
        found = [clip for _, clip in read if clip is not None]
        if options["scheme"] == "bit" and None in scales:
            reader.reasons.append(f"{attention}.clip_*: got nothing, need four scales")
        elif len(found) == 4:
            clips = (*found[:3], min(found[3], 1.0))  # no probability is above 1
            levels = (*[2 ** (options["bits"] - 1) - 1] * 3, prob_levels(options))
            scales = tuple(clip / high for clip, high in zip(clips, levels, strict=True))
        elif found or len({scale is None for scale in scales}) > 1:
            reader.reasons.append(f"{attention}.clip_*: got some, need four scales, clips or none")
    return LatentLayer(
        query=reader.linear(f"{attention}.query"), key=reader.linear(f"{attention}.key"),
        value=reader.linear(f"{attention}.value"),
        out=reader.linear(f"{name}.attention.output.dense"),
        up=reader.linear(f"{name}.intermediate.dense"),
        down=reader.linear(f"{name}.output.dense", signed=not reader.options["unsigned_inner"]),
        attn_norm=reader.norm(f"{name}.attention.output.LayerNorm"),
        ffn_norm=reader.norm(f"{name}.output.LayerNorm"), scales=scales,
        clips=None if clips is None else clips[:3],
    )  # fmt: skip
