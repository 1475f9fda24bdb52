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
from .latent import LatentBert, LatentLayer, LatentLinear, Linears

__all__ = ["read_checkpoint", "recognise"]

#: scheme -> a pattern of entries that only its published code, or filbert's own, writes
_FINGERPRINTS = {
    "bit": r"\.(query|key|dense)\.move\.bias$|\.move_[qkv]\.bias$",
    "bibert": r"\.(query|key|dense)\.(scale|act_clip_val)$|\.output\.gate$",
    "binarybert": r"\.(query|key|dense)(_[12])?\.input_clip_val$",
}
#: entries that no forward pass reads
_UNREAD = (
    r"\.(weight_clip_val|embed_clip_val|act_clip_val|scale|gate|position_ids)$"
    r"|\.move_[qkv]\.bias$|\.clip_(query|key|value|attn)$|\.input_clip_val$|^cls\."
)
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


def _clean(name: str) -> str:
    """An entry's name without DataParallel's and the head's prefixes, and with today's endings."""
    name = name.removeprefix("module.").removeprefix("bert.")
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


class _Reader:
    """Takes entries out of a state dict; collects what is wrong."""

    def __init__(self, entries: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.entries = {_clean(name): value for name, value in entries.items()}
        self.options = options
        self.reasons: list[str] = []
        self.used: set[str] = set()

    def take(self, name: str, ndim: int) -> Tensor:
        t = self.entries.get(name)
        self.used.add(name)
        if not isinstance(t, Tensor):
            self.reasons.append(f"{name}: got nothing, need a tensor of {ndim} dimensions")
        elif t.ndim != ndim or not t.is_floating_point() or not bool(t.isfinite().all()):
            self.reasons.append(
                f"{name}: got {t.dtype} {tuple(t.shape)}, need {ndim} dimensions of finite floats"
            )
        else:
            return t.detach().float().cpu()
        return torch.zeros([1] * ndim)

    def maybe(self, name: str) -> Tensor | None:
        t = self.entries.get(name)
        self.used.add(name)
        return t.detach().float().cpu() if isinstance(t, Tensor) else None

    def scale(self, name: str) -> tuple[float | None, float | None]:
        """A learned scale, and a clip: entries of one element are the first, of two the second."""
        t = self.maybe(name)
        if t is None:
            return None, None
        if t.numel() == 2:
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
        split = f"{name}.weight" not in self.entries and f"{name}_1.weight" in self.entries
        return tuple(self._linear(part, signed) for part in self._names(name, split))

    @staticmethod
    def _names(name: str, split: bool) -> list[str]:
        return [f"{name}_1", f"{name}_2"] if split else [name]

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
            shift = self.maybe(f"{name}.move.bias")
            if scale is None:
                self.reasons.append(f"{name}.input_clip_val: got nothing, need BiT's scale")
        elif options["scheme"] == "binarybert":
            bits = options["bits"]
            if not options["rows"]:
                scale, clip = self.scale(f"{name}.input_clip_val")
            if clip is not None:
                scale = clip / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
        centre, own = SCHEMES[options["scheme"]]
        granularity = options["granularity"] or own
        bias = self.maybe(f"{name}.bias")
        for what, t, size in (("bias", bias, 0), ("move.bias", shift, 1)):
            if t is not None and t.shape != weight.shape[size : size + 1]:
                need = weight.shape[size]
                self.reasons.append(f"{name}.{what}: got {tuple(t.shape)}, need [{need}]")
        return LatentLinear(
            name, weight, bias, centre, granularity, bits, signed, scale, shift, clip
        )

    def table(self, name: str) -> tuple[Tensor, ...]:
        split = f"{name}.weight" not in self.entries and f"{name}_1.weight" in self.entries
        return tuple(self.take(f"{part}.weight", 2) for part in self._names(name, split))


def _values_of_rows(weight: Tensor) -> int:
    """The most different values that some rows of ``weight`` have; 0 for rows too short to tell."""
    if weight.shape[1] < 16:
        return 0
    rows = weight[:: max(1, weight.shape[0] // 8)]
    return max((row.unique().numel() for row in rows), default=0)


def _refusals(names: list[str], values: list[Any]) -> list[str]:
    """Why these entries are a checkpoint that cannot be read, whatever the scheme."""
    reasons = []
    if any(re.search(r"encoder\.layers\.\d+\.(self_attn|linear1)\.", n) for n in names) or any(
        not isinstance(v, Tensor) for v in values
    ):
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


def _settings(config: Any) -> dict[str, Any]:
    """A config as a dict, whether it is one, an object with ``to_dict``, or None."""
    if config is None:
        return {}
    return dict(config if isinstance(config, Mapping) else config.to_dict())


def _own_model(model: Any) -> dict[str, Any]:
    """What filbert's own eager model says about itself; empty for any other."""
    from .student import BinarizedBert

    if not isinstance(model, BinarizedBert):
        return {}
    own = model.config
    return {
        "scheme": own.scheme, "ties": own.ties, "score_ties": own.score_ties, "bits": own.bits,
        "rows": own.mode == "row", "granularity": own.granularity,
        "unsigned_inner": own.hidden_act == "relu",
    }  # fmt: skip


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
            (a head of 64 values if missing), ``layer_norm_eps`` (1e-12), ``hidden_act``,
            ``input_bits``, ``weight_layerwise``, ``embed_layerwise``, ``sym_quant_ffn_attn``.
        activation_bits: of BinaryBERT, instead of the config's ``input_bits``.
        trained: see :func:`filbert.binarize`.

    Raises:
        ConvertError: with all reasons.
    """
    entries = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    settings = _settings(getattr(source, "config", None) if config is None else config)
    own = _own_model(source)
    names = [_clean(name) for name in entries]
    who = type(source).__name__ if isinstance(source, nn.Module) else "the state dict"
    found = own.get("scheme") or recognise(names)
    reasons = _refusals(names, list(entries.values()))
    if scheme is not None and scheme not in SCHEMES:
        reasons.append(f"scheme: got {scheme!r}, need one of {sorted(SCHEMES)}")
    if scheme is not None and found is not None and scheme != found:
        reasons.append(f"scheme: got {scheme!r}, but its entries are those of {found!r}")
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
    options = _options(chosen, settings, own, activation_bits)
    reader = _Reader(entries, options)
    reader.reasons += _unsupported(options, settings)
    latent = _read(reader, settings)
    if reader.reasons:
        raise ConvertError(f"{who} cannot be binarized", reader.reasons, "nothing was changed")
    left = sorted(n for n in set(reader.entries) - reader.used if not re.search(_UNREAD, n))
    if left:
        latent.notes.append(f"{len(left)} entries are not part of the model: {', '.join(left[:4])}")
    return latent


def _options(
    scheme: str, settings: dict[str, Any], own: dict[str, Any], activation_bits: int | None
) -> dict[str, Any]:
    bits = activation_bits or own.get("bits") or settings.get("input_bits")
    bits = int(bits or (8 if scheme == "binarybert" else 1))
    default = {"bibert": "gelu", "bit": "relu", "binarybert": "gelu"}[scheme]
    # The published BiBERT has GELU whatever its config says.
    published_gelu = scheme == "bibert" and not own
    activation = default if published_gelu else settings.get("hidden_act") or default
    granularity = own.get("granularity")
    if not own and "weight_layerwise" in settings and scheme != "bibert":
        granularity = "tensor" if settings["weight_layerwise"] else "row"
    unsigned = own.get("unsigned_inner", scheme == "bit" or activation == "relu")
    return {
        "scheme": scheme, "bits": bits, "activation": activation, "granularity": granularity,
        "unsigned_inner": bool(unsigned) and scheme != "bibert", "rows": own.get("rows", False),
        "ties": own.get("ties", "zero"), "score_ties": own.get("score_ties", "below"),
    }  # fmt: skip


def _unsupported(options: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    reasons = []
    need = (2, 4, 8) if options["scheme"] == "binarybert" else (1,)
    if options["bits"] not in need:
        reasons.append(
            f"activations: got {options['bits']} bits, {options['scheme']!r} needs one of {need}"
        )
    if settings.get("weight_bits", 1) != 1:
        reasons.append(f"weight_bits: got {settings['weight_bits']}, need 1")
    if options["activation"] not in ("gelu", "relu"):
        reasons.append(f"hidden_act: got {options['activation']!r}, need 'gelu' or 'relu'")
    if options["scheme"] == "bit":
        for name in ("sym_quant_ffn_attn", "not_quantize_attention"):
            if settings.get(name):
                reasons.append(f"{name}: got true, need BiT's attention of {{0, a}}")
    return reasons


def _read(reader: _Reader, settings: dict[str, Any]) -> LatentBert:
    options, scheme = reader.options, reader.options["scheme"]
    words = reader.table("embeddings.word_embeddings")
    hidden = words[0].shape[1]
    heads = int(settings.get("num_attention_heads") or max(1, hidden // 64))
    found = {int(m[1]) for n in reader.entries if (m := re.match(r"encoder\.layer\.(\d+)\.", n))}
    if not found or found != set(range(len(found))):
        reader.reasons.append(f"encoder.layer: got {sorted(found)[:4]}, need layers from 0 on")
    layers = [_read_layer(reader, f"encoder.layer.{index}") for index in range(len(found))]
    pooler = None
    if any(name.startswith("pooler.") for name in reader.entries):
        pooler = reader.linear("pooler.dense")
    classifier, head = None, "pooled"
    for name, kind in (("classifier", "pooled"), ("qa_outputs", "tokens")):
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
        _check_sizes(latent, hidden, reader.reasons)
    if "num_attention_heads" not in settings:
        latent.notes.append(f"no num_attention_heads given: took {heads} heads of 64")
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


def _check_sizes(latent: LatentBert, hidden: int, reasons: list[str]) -> None:
    """Whether everything fits together, and whether there are operators for it."""
    width = latent.layers[0].query[0].weight.shape[0]
    dim, rest = divmod(width, latent.heads)
    unit, most = (8, 128) if latent.bits > 1 else (32, 128)
    if rest or dim % unit or not 0 < dim <= most:
        reasons.append(
            f"heads: got {latent.heads} of {width / latent.heads:g} values, need a multiple of "
            f"{unit} up to {most} each; try num_attention_heads in config="
        )
    for layer in latent.layers:
        inner = layer.up[0].weight.shape[0]
        shapes = dict.fromkeys(("query", "key", "value"), (width, hidden))
        shapes |= {"out": (hidden, width), "up": (inner, hidden), "down": (hidden, inner)}
        for side, shape in shapes.items():
            for linear in getattr(layer, side):
                if linear.weight.shape != shape:
                    got = tuple(linear.weight.shape)
                    reasons.append(f"{linear.name}.weight: got {got}, need {shape}")
        for norm in (layer.attn_norm, layer.ffn_norm):
            if any(t.shape != (hidden,) for t in norm):
                reasons.append(f"LayerNorm: got {tuple(norm[0].shape)}, need [{hidden}]")
    if any(t.shape[1] != hidden for t in (latent.position, latent.token_type)):
        reasons.append(f"embeddings: got other sizes than the words', need {hidden}")
