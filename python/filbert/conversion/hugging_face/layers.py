"""Finds BERT-shaped encoders by their structure.

A layer is recognised by the modules it holds and not by its class, so BERT, RoBERTa, XLM-R,
CamemBERT, ELECTRA, DistilBERT and their relatives need no list. Because models exist that look the
same and mean something else (another attention, LayerNorm in another place, relative positions),
whatever is not known here, a submodule, a parameter or an attribute, is a reason to refuse;
:mod:`filbert.convert` then also proves the match by running both.

Nothing here imports transformers: a model of it can only exist where it is already imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ... import ops
from ..._load import have_ops, why_no_kernels
from ...nn.parts import LayerParts
from .calling import is_capture_hook

__all__ = ["layer_list", "looks_like_encoder", "read_encoder", "read_layer"]

#: plain attributes that do not change what a layer computes, or the values for which they do not.
#: Everything not listed is refused: a look-alike usually differs by one attribute.
_ANY: Callable[[Any], bool] = lambda value: True  # noqa: E731
_FALSE: Callable[[Any], bool] = lambda value: not value  # noqa: E731
_ATTRIBUTES: dict[str, Callable[[Any], bool]] = {
    "config": _ANY,
    "layer_idx": _ANY,
    "chunk_size_feed_forward": _ANY,  # the same rows in pieces
    "seq_len_dim": lambda value: value == 1,
    "gradient_checkpointing": _ANY,
    "is_decoder": _FALSE,
    "is_causal": _FALSE,
    "is_cross_attention": _FALSE,
    "add_cross_attention": _FALSE,
    "pruned_heads": _ANY,  # pruned heads are gone from the weights
    "num_attention_heads": _ANY,
    "attention_head_size": _ANY,
    "all_head_size": _ANY,
    "n_heads": _ANY,
    "dim": _ANY,
    "scaling": _ANY,
    "attention_dropout": _ANY,
    "dropout_prob": _ANY,
    "require_contiguous_qkv": _ANY,
    "position_embedding_type": lambda value: value in (None, "absolute"),
}


@dataclass
class _Reader:
    """Walks one layer, and writes down everything that is not as it should be."""

    reasons: list[str] = field(default_factory=list)

    def module(
        self,
        module: nn.Module,
        where: str,
        children: Iterable[str],
        extra: Iterable[str] = (),
    ) -> None:
        """``module`` must hold exactly these children, no parameters of its own, and no attribute
        beyond the known ones and ``extra``."""
        allowed = set(children)
        for name, child in module.named_children():
            if name not in allowed:
                self.reasons.append(f"{where} holds an unknown module {name!r} ({_kind(child)})")
        own = [n for n, _ in module.named_parameters(recurse=False)]
        own += [n for n, _ in module.named_buffers(recurse=False)]
        if own:
            self.reasons.append(f"{where} holds unknown parameters or buffers {sorted(own)}")
        for name, value in vars(module).items():
            if name in _MODULE_ATTRIBUTES or name.startswith("_") or name in extra:
                continue
            if name == "forward":
                self.reasons.append(f"{where} has its forward replaced (a wrapper or offload hook)")
            elif name not in _ATTRIBUTES:
                self.reasons.append(f"{where} has an unknown attribute {name!r} = {value!r:.40}")
            elif not _ATTRIBUTES[name](value):
                self.reasons.append(f"{where} has {name}={value!r:.40}")

    def child(self, module: nn.Module, name: str, where: str) -> nn.Module | None:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
        self.reasons.append(f"{where} has no module {name!r}")
        return None

    def linear(self, module: nn.Module, name: str, where: str) -> nn.Linear | None:
        child = self.child(module, name, where)
        if child is None:
            return None
        if type(child) is not nn.Linear:
            self.reasons.append(
                f"{where}.{name} is {_kind(child)}, need exactly nn.Linear "
                "(quantised and adapter-wrapped layers are left alone; merge adapters first)"
            )
            return None
        return child

    def norm(self, module: nn.Module, name: str, where: str) -> nn.LayerNorm | None:
        child = self.child(module, name, where)
        if child is None:
            return None
        if type(child) is not nn.LayerNorm:
            self.reasons.append(f"{where}.{name} is {_kind(child)}, need exactly nn.LayerNorm")
            return None
        if len(child.normalized_shape) != 1 or child.weight is None or child.bias is None:
            self.reasons.append(f"{where}.{name} needs a weight and a bias over one dimension")
            return None
        return child

    def dropout(self, *holders: nn.Module | None) -> float:
        probabilities = [0.0]
        for holder in holders:
            child = getattr(holder, "dropout", None)
            if isinstance(child, nn.Dropout):
                probabilities.append(child.p)
            elif isinstance(child, nn.Module):
                self.reasons.append(f"dropout is {_kind(child)}, need torch.nn.Dropout")
        return max(probabilities)

    def number(self, module: nn.Module, names: tuple[str, ...], where: str) -> int:
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, int):
                return value
        self.reasons.append(f"{where} has no attribute {' or '.join(names)}")
        return 0


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def read_layer(layer: nn.Module) -> tuple[LayerParts | None, list[str]]:
    """The parts of one encoder layer, or every reason why it is not one this package can run.

    Returns:
        ``(parts, [])``, or ``(None, reasons)``.
    """
    reader = _Reader()
    if hasattr(layer, "ffn") and hasattr(layer, "sa_layer_norm"):
        parts = _read_distilbert(layer, reader)
    else:
        parts = _read_bert(layer, reader)
    if parts is not None:
        _check_numbers(parts, reader)
    return (None, reader.reasons) if reader.reasons else (parts, [])


def _read_bert(layer: nn.Module, r: _Reader) -> LayerParts | None:
    """attention.{self.{query,key,value}, output.{dense,LayerNorm}}, intermediate.dense,
    output.{dense,LayerNorm}."""
    if getattr(layer, "crossattention", None) is not None:
        r.reasons.append("the layer has cross-attention")
    r.module(layer, "layer", ("attention", "crossattention", "intermediate", "output"))
    attention = r.child(layer, "attention", "layer")
    intermediate = r.child(layer, "intermediate", "layer")
    output = r.child(layer, "output", "layer")
    if attention is None or intermediate is None or output is None:
        return None
    r.module(attention, "attention", ("self", "output"))
    inner = r.child(attention, "self", "attention")
    mixed = r.child(attention, "output", "attention")
    if inner is None or mixed is None:
        return None
    r.module(inner, "attention.self", ("query", "key", "value", "dropout"))
    r.module(mixed, "attention.output", ("dense", "LayerNorm", "dropout"))
    r.module(intermediate, "intermediate", ("dense", "intermediate_act_fn"),
             extra=("intermediate_act_fn",))  # fmt: skip
    r.module(output, "output", ("dense", "LayerNorm", "dropout"))
    activation = getattr(intermediate, "intermediate_act_fn", None)
    return _assemble(
        r,
        linears={
            "query": (inner, "query", "attention.self"),
            "key": (inner, "key", "attention.self"),
            "value": (inner, "value", "attention.self"),
            "out": (mixed, "dense", "attention.output"),
            "up": (intermediate, "dense", "intermediate"),
            "down": (output, "dense", "output"),
        },
        norms={
            "attn_norm": (mixed, "LayerNorm", "attention.output"),
            "ffn_norm": (output, "LayerNorm", "output"),
        },
        activation=activation,
        attention=inner,
        dropout=r.dropout(inner, mixed, output),
    )


def _read_distilbert(layer: nn.Module, r: _Reader) -> LayerParts | None:
    """attention.{q,k,v,out}_lin, sa_layer_norm, ffn.lin{1,2}, output_layer_norm."""
    r.module(layer, "layer", ("attention", "sa_layer_norm", "ffn", "output_layer_norm"))
    attention = r.child(layer, "attention", "layer")
    ffn = r.child(layer, "ffn", "layer")
    if attention is None or ffn is None:
        return None
    r.module(attention, "attention", ("q_lin", "k_lin", "v_lin", "out_lin", "dropout"))
    r.module(ffn, "ffn", ("lin1", "lin2", "activation", "dropout"), extra=("activation",))
    return _assemble(
        r,
        linears={
            "query": (attention, "q_lin", "attention"),
            "key": (attention, "k_lin", "attention"),
            "value": (attention, "v_lin", "attention"),
            "out": (attention, "out_lin", "attention"),
            "up": (ffn, "lin1", "ffn"),
            "down": (ffn, "lin2", "ffn"),
        },
        norms={
            "attn_norm": (layer, "sa_layer_norm", "layer"),
            "ffn_norm": (layer, "output_layer_norm", "layer"),
        },
        activation=getattr(ffn, "activation", None),
        attention=attention,
        dropout=r.dropout(attention, ffn),
    )


def _assemble(
    r: _Reader,
    *,
    linears: dict[str, tuple[nn.Module, str, str]],
    norms: dict[str, tuple[nn.Module, str, str]],
    activation: Any,
    attention: nn.Module,
    dropout: float,
) -> LayerParts | None:
    modules: dict[str, Any] = {part: r.linear(*place) for part, place in linears.items()}
    modules |= {part: r.norm(*place) for part, place in norms.items()}
    if not callable(activation):
        r.reasons.append("the layer has no activation function")
    elif isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        r.reasons.append(f"the activation {_kind(activation)} has parameters of its own")
    num_heads = r.number(attention, ("num_attention_heads", "n_heads"), "attention")
    head_dim = r.number(attention, ("attention_head_size",), "attention")
    if None in modules.values() or not callable(activation) or not num_heads or not head_dim:
        return None
    scale = getattr(attention, "scaling", None)
    names = {
        part: name if where == "layer" else f"{where}.{name}"
        for part, (_, name, where) in (linears | norms).items()
    }
    return LayerParts(
        **modules,
        activation=activation,
        num_heads=num_heads,
        head_dim=head_dim,
        scale=float(head_dim**-0.5 if scale is None else scale),
        dropout=dropout,
        names=names,
    )


def _check_numbers(parts: LayerParts, r: _Reader) -> None:
    """Shapes that fit together, and sizes, dtypes and devices the kernels have."""
    hidden, inner = parts.query.in_features, parts.num_heads * parts.head_dim
    wide = parts.up.out_features
    for name, want in {
        "query": (inner, hidden), "key": (inner, hidden), "value": (inner, hidden),
        "out": (hidden, inner), "up": (wide, hidden), "down": (hidden, wide),
    }.items():  # fmt: skip
        got = tuple(getattr(parts, name).weight.shape)
        if got != want:
            r.reasons.append(f"{parts.names[name]} has weight {list(got)}, need {list(want)}")
    for name in ("attn_norm", "ffn_norm"):
        if getattr(parts, name).normalized_shape != (hidden,):
            r.reasons.append(f"{parts.names[name]} is not over the hidden size {hidden}")
    device = parts.query.weight.device
    if not 1 <= parts.head_dim <= (most := ops.head_dims(device)[-1]):
        r.reasons.append(
            f"head dimension {parts.head_dim}: on {device.type} the attention kernel has 1 to "
            f"{most}"
        )
    modules = (*parts.linears(), parts.attn_norm, parts.ffn_norm)
    places = {(p.dtype, p.device) for module in modules for p in module.parameters()}
    if len(places) > 1:
        r.reasons.append(
            "parameters of one layer differ in dtype or device: "
            + ", ".join(sorted(f"{dtype} on {device}" for dtype, device in places))
        )
    for dtype, device in places:
        r.reasons += _device_reasons(dtype, device)


def _device_reasons(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why weights of ``dtype`` on ``device`` cannot be packed; empty if they can."""
    reasons = []
    known = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    if dtype not in known:
        names = ", ".join(known.values())
        reasons.append(
            f"dtype {dtype}: on {device.type} the kernels have {names}; try model.float() or "
            "model.bfloat16()"
        )
    if device.type == "meta":
        reasons.append("device meta: its weights hold no values; try loading them first")
    # Without any compiled library the CPU runs the reference code, which is slow and right.
    elif (have_ops() or device.type != "cpu") and (why := why_no_kernels(device)) is not None:
        reasons.append(f"device {device}: {why}; try model.cpu()")
    return reasons


def layer_list(encoder: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and list of an encoder's layers: its only non-empty ``ModuleList``."""
    lists = [(n, m) for n, m in encoder.named_children() if isinstance(m, nn.ModuleList) and len(m)]
    return lists[0] if len(lists) == 1 else None


def looks_like_encoder(module: nn.Module) -> bool:
    """Whether ``module`` is worth reading: a list of layers that hold a norm and some matrices."""
    found = layer_list(module)
    if found is None:
        return False
    layer = found[1][0]
    norms = any("norm" in _kind(m).lower() for m in layer.modules())
    return norms and sum(p.ndim == 2 for p in layer.parameters()) >= 4


def read_encoder(encoder: nn.Module) -> tuple[list[LayerParts], list[str]]:
    """The parts of every layer of ``encoder``, or every reason why it is not BERT-shaped.

    Returns:
        ``(parts, [])``, or ``([], reasons)``.
    """
    found = layer_list(encoder)
    if found is None:
        return [], ["it does not hold exactly one list of layers"]
    name, layers = found
    reader = _Reader()
    reader.module(encoder, "the encoder", (name,), extra=("n_layers", "num_hidden_layers"))
    reasons = reader.reasons
    if len({id(layer) for layer in layers}) < len(layers):
        reasons.append("layers are shared: the same layer appears more than once")
    for where, module in encoder.named_modules():
        hooks = [h for h in module._forward_hooks.values() if not is_capture_hook(h)]
        if hooks or module._forward_pre_hooks:
            reasons.append(f"{where or 'the encoder'} has forward hooks, which would never run")
    parts: list[LayerParts] = []
    by_reason: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        layer_parts, wrong = read_layer(layer)
        for reason in wrong:
            by_reason.setdefault(reason, []).append(index)
        if layer_parts is not None:
            parts.append(layer_parts)
    for reason, where_found in by_reason.items():
        everywhere = len(where_found) == len(layers)
        places = "all layers" if everywhere else f"layers {where_found}"
        reasons.append(f"{places}: {reason}")
    first = next(iter(parts), None)
    if not reasons and first is not None:
        kinds = {(p.query.weight.dtype, p.query.weight.device, p.query.in_features) for p in parts}
        if len(kinds) > 1:
            reasons.append("layers differ in dtype, device or hidden size")
    return ([], reasons) if reasons else (parts, [])
