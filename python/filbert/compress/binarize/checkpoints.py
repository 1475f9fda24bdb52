"""Reads the latent weights of BiBERT, BiT and BinaryBERT models, whoever trained them.

A checkpoint is recognised by entries that only its own code writes. Whatever is refused is said
with all reasons at once.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...convert import ConvertError
from ...nn.linear_binary import SCHEMES
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
from .latent import LatentBert, LatentLayer, LatentLinear, Linears
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


class _Reader:
    """Takes entries out of the state dict of a model of class ``kind``; collects what is wrong."""

    def __init__(
        self, entries: Mapping[str, Tensor], options: Mapping[str, Any], kind: str
    ) -> None:
        self.entries = {clean(name): value for name, value in entries.items()}
        self.options, self.kind = options, kind
        self.reasons: list[str] = []
        self.used: set[str] = set()

    def take(self, name: str, ndim: int) -> Tensor:
        t = self.maybe(name, ndim)
        if name not in self.entries:
            self.reasons.append(f"{name}: got nothing, need a tensor of {ndim} dimensions")
        return torch.zeros([1] * ndim) if t is None else t

    def maybe(self, name: str, ndim: int | None = None) -> Tensor | None:
        """An entry of ``ndim`` dimensions, if given; None if it is not there or unfit."""
        self.used.add(name)
        t = self.entries.get(name)
        if t is None:
            return None
        got = f"{t.dtype} {tuple(t.shape)}"
        if not t.is_floating_point() or (ndim is not None and t.ndim != ndim):
            need = "floats" if ndim is None else f"floats of {ndim} dimensions"
            self.reasons.append(f"{name}: got {got}, need {need}")
        elif ndim is not None and (odd := int((~t.isfinite()).sum())):
            self.reasons.append(f"{name}: got {odd} infinite or NaN values, need finite floats")
        else:
            return t.detach().float().cpu()
        return None

    def scale(self, name: str) -> tuple[float | None, float | None]:
        """A learned scale, and a clip: entries of one element are the first, of two the second."""
        t = self.maybe(name)
        if t is None:
            return None, None
        if t.numel() == 2 and bool(t.isfinite().all()):
            return None, float(t.abs().max())
        value = float(t.flatten()[0]) if t.numel() == 1 else math.nan
        if not math.isfinite(value):
            got = value if t.numel() == 1 else tuple(t.shape)
            self.reasons.append(
                f"{name}: got {got}, need one finite scale; try calibrating the model with a first "
                "batch"
            )
        return value, None

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self.take(f"{name}.weight", 1), self.take(f"{name}.bias", 1)

    def linear(self, name: str, signed: bool = True) -> Linears:
        return tuple(self._linear(part, signed) for part in self._names(name))

    def _names(self, name: str) -> list[str]:
        """Of an entry's parts: itself, or its two halves."""
        if f"{name}.weight" in self.entries or f"{name}_1.weight" not in self.entries:
            return [name]
        if self.options["scheme"] != "binarybert":
            self.reasons.append(
                f"{name}_1.weight: got a split layer, need an unsplit one; only 'binarybert' has "
                "halves that are added"
            )
        return [f"{name}_1", f"{name}_2"]

    def _linear(self, name: str, signed: bool) -> LatentLinear:
        options = self.options
        weight = self.take(f"{name}.weight", 2)
        if (values := _values_of_rows(weight)) in (2, 3):
            self.reasons.append(
                f"{name}.weight: got {values} different values in a row, need latent floats: signs "
                "saved by themselves have lost scales and means; try the checkpoint that was saved "
                "with its floating-point weights (--save_fp_model)"
            )
        scale = clip = shift = None
        bits = 1
        if options["scheme"] == "bit":
            scale, _ = self.scale(f"{name}.input_clip_val")
            shift = self.maybe(f"{name}.move.bias", 1)
            if f"{name}.input_clip_val" not in self.entries:
                self.reasons.append(f"{name}.input_clip_val: got nothing, need BiT's scale")
        elif options["scheme"] == "binarybert":
            bits = options["bits"]
            if not options["rows"]:
                scale, clip = self.scale(f"{name}.input_clip_val")
            if clip is not None:
                scale = clip / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
        centre, own = SCHEMES[options["scheme"]]
        granularity = options["granularity"] or own
        bias = self.maybe(f"{name}.bias", 1)
        for what, t, size in (("bias", bias, 0), ("move.bias", shift, 1)):
            if t is not None and t.shape != weight.shape[size : size + 1]:
                need = weight.shape[size]
                self.reasons.append(f"{name}.{what}: got {tuple(t.shape)}, need [{need}]")
        return LatentLinear(
            name, weight, bias, centre, granularity, bits, signed, scale, shift, clip
        )

    def table(self, name: str) -> tuple[Tensor, ...]:
        return tuple(self.take(f"{part}.weight", 2) for part in self._names(name))


def _values_of_rows(weight: Tensor) -> int:
    """The most different values that some rows of ``weight`` have; 0 for rows too short to tell."""
    if weight.shape[1] < 16:
        return 0
    rows = weight[:: max(1, weight.shape[0] // 8)]
    return max((row.unique().numel() for row in rows), default=0)


def read_checkpoint(
    source: nn.Module | Mapping[str, Any],
    *,
    scheme: str | None = None,
    config: Any = None,
    activation_bits: int | None = None,
    trained: bool = False,
) -> LatentBert:
    """Latent weights and everything that decides what they mean.

    Args:
        source: a model, or a state dict with or without ``module.`` and ``bert.`` prefixes.
        scheme: where entries do not tell; see :func:`filbert.binarize`.
        config: a dict or config object, the model's own if not given: ``num_attention_heads``
            (needed), ``layer_norm_eps`` (1e-12), ``hidden_act``, ``architectures``, ``input_bits``,
            ``weight_layerwise``, ``embed_layerwise``, ``sym_quant_ffn_attn``. One of filbert's own
            models, or its ``config.json``, tells everything else, the scheme too.
        activation_bits: of BinaryBERT, where the config has no ``input_bits``.
        trained: see :func:`filbert.binarize`.

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
    trained_bits = settings.get("input_bits") if own is None else own.bits
    learned = own is not None or printed is not None
    if learned and trained_bits and activation_bits not in (None, trained_bits):
        reasons.append(
            f"activation_bits: got {activation_bits}, but it was trained with {trained_bits}; "
            "leave it out"
        )
    if reasons:  # go on with what is sound, to find all reasons
        options["bits"] = 8 if chosen == "binarybert" else 1
    reader = _Reader(entries, options, type(source).__name__)
    reader.reasons += reasons
    latent = _read(reader, settings)
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
    options = {
        "scheme": scheme, "activation": activation, "granularity": None, "rows": False,
        "ties": "zero", "score_ties": "below",
        "unsigned_inner": scheme != "bibert" and (scheme == "bit" or activation == "relu"),
    }  # fmt: skip
    bits = settings.get("input_bits")
    if own is not None:
        bits = own.bits
        options |= {
            "granularity": own.granularity, "rows": own.mode == "row", "ties": own.ties,
            "score_ties": own.score_ties,
            "unsigned_inner": own.hidden_act == "relu" and scheme != "bibert",
        }  # fmt: skip
    elif "weight_layerwise" in settings and scheme != "bibert":
        options["granularity"] = "tensor" if settings["weight_layerwise"] else "row"
    if bits is None:
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
    if latent.scheme == "binarybert" and not settings.get("sym_quant_ffn_attn"):
        notes.append(
            "activations are symmetric around 0; the published code has asymmetric ones, from the "
            "least to the largest value, unless its config says sym_quant_ffn_attn"
        )
    return notes


def _read(reader: _Reader, settings: dict[str, Any]) -> LatentBert:
    options, scheme = reader.options, reader.options["scheme"]
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
        scheme=scheme, heads=heads, eps=float(settings.get("layer_norm_eps") or 1e-12),
        activation=options["activation"], words=words, word_centre=own_table,
        word_granularity="tensor" if settings.get("embed_layerwise") else "row",
        position=reader.take("embeddings.position_embeddings.weight", 2),
        token_type=reader.take("embeddings.token_type_embeddings.weight", 2),
        norm=reader.norm("embeddings.LayerNorm"), layers=layers, pooler=pooler,
        classifier=classifier, head=head, bits=options["bits"], ties=options["ties"],
        score_ties=options["score_ties"],
    )  # fmt: skip
    if not reader.reasons:
        reader.reasons += unfit_sizes(latent, hidden)
    if scheme == "binarybert":
        latent.notes.append("the softmax is not rounded; the attention rows say what that changes")
        if any(linear.clip is not None for linear in layers[0].query):
            latent.notes.append(
                "clipped activations have the static scale of their clip; the published code takes "
                "the largest magnitude of the whole batch, which makes a text depend on others"
            )
    return latent


def _read_layer(reader: _Reader, name: str) -> LatentLayer:
    attention = f"{name}.attention.self"
    scales: tuple[float | None, ...] = (None, None, None, None)
    clip = None
    if reader.options["scheme"] != "bibert" and not reader.options["rows"]:
        read = [reader.scale(f"{attention}.clip_{n}") for n in ("query", "key", "value", "attn")]
        scales, clip = tuple(scale for scale, _ in read), read[0][1]
        if reader.options["scheme"] == "bit" and None in scales:
            reader.reasons.append(f"{attention}.clip_*: got nothing, need four scales")
    return LatentLayer(
        query=reader.linear(f"{attention}.query"), key=reader.linear(f"{attention}.key"),
        value=reader.linear(f"{attention}.value"),
        out=reader.linear(f"{name}.attention.output.dense"),
        up=reader.linear(f"{name}.intermediate.dense"),
        down=reader.linear(f"{name}.output.dense", signed=not reader.options["unsigned_inner"]),
        attn_norm=reader.norm(f"{name}.attention.output.LayerNorm"),
        ffn_norm=reader.norm(f"{name}.output.LayerNorm"), scales=scales, clip=clip,
    )  # fmt: skip
