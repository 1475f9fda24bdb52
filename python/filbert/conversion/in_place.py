"""``convert`` a model in place, ``revert`` it, and ``report`` what was done.

Encoders are found by structure, read by :mod:`filbert.conversion.hugging_face.layers`, and swapped
for a :class:`~filbert.conversion.swap.SwappedEncoder`. Each swap is proven on a small example
before it is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..nn.build import CompressedParts
from ..nn.grouped.embedding import EmbeddingGrouped
from ..plan import EncoderPlan, PackedEncoderConfig
from .hugging_face.holders import module_of
from .probe import Example, difference, make_example
from .reporting import Report, ReportRow, left_alone, rows_of_encoder
from .swap import SwappedEncoder, refusals_of

__all__ = ["ConvertError", "convert", "report", "revert"]

Model = TypeVar("Model")

#: why the last convert left an encoder alone, for report
_refused: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


class ConvertError(ValueError):
    """A model that filbert will not convert.

    Attributes:
        reasons: all of them, each with the name of the module it is about.
    """

    def __init__(self, what: str, reasons: list[str], advice: str) -> None:
        self.reasons = reasons
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        super().__init__(f"{what}:{lines}\n{advice}")


@dataclass
class _Candidate:
    """A module that may be an encoder, and what is known about it."""

    name: str
    module: nn.Module
    owner: nn.Module | None  # the module that embeds tokens and calls it
    reasons: list[str]

    def say(self) -> list[str]:
        who = f"{self.name or 'the model itself'} ({type(self.module).__name__})"
        return [f"{who}: {reason}" for reason in self.reasons]


def convert(
    model: Model,
    config: PackedEncoderConfig | EncoderPlan | None = None,
    *,
    strict: bool = True,
) -> Model:
    """Swaps every BERT-shaped encoder in ``model`` for a packed one, in place.

    BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT, ELECTRA and relatives, with any head or none. The
    model is called as before and is for inference only: run it in eval mode, inside
    ``torch.inference_mode()`` or ``torch.no_grad()``. A call that would have to record a gradient
    raises; it does not where nothing up to and in the encoder requires one, so that what follows a
    frozen encoder can be trained. Rows that are padding come back as zeros, or with
    ``PackedEncoderConfig(masked_rows="compute")`` as transformers computes them. On a CPU a text's
    hidden states have the same bits alone, in any batch and on any number of threads.
    ``state_dict`` and ``save_pretrained`` give the original names and weights; casting and moving
    the model packs it again. Converting a converted model does nothing.

    The encoder computes with packed copies of its weights, and ``load_state_dict`` is how new ones
    get there. Its parameters keep their names, shapes, dtype and device, but the weights among them
    may read as NaN. Writing one in place, or a tensor of its ``state_dict``, is an error at the
    next call. Replacing a part such as ``encoder.layer`` is an error at once. Careful: PyTorch does
    not count writes through ``parameter.data`` or NumPy, those of fused optimizers, and those to
    parameters that were made in inference mode. They cannot be noticed, and change nothing; neither
    do changes to modules that were taken out of the encoder before.

    A converted model can be copied, saved and sent to other processes; the dense weights travel,
    and each copy packs its own. ``share_memory`` leaves the encoder as it is.

    Args:
        model: any module; float32, bfloat16 or float16 weights. Or what keeps
            one as its ``model``, such as a pipeline.
        config: settings, or a plan of which kind each slot of each layer is; all are dense and
            the settings the defaults if not given. A plan with other kinds is proven with all slots
            dense first: another kind computes something else by its nature.
        strict: refuse the whole model if any encoder in it is refused. If False, what can be
            converted is, and :func:`report` says why the rest was left.

    Returns:
        ``model``.

    Raises:
        TypeError: no model.
        ConvertError: with all reasons at once: a decoder or cross-attention, training mode with
            dropout, ``output_attentions`` in the model's config, an unsupported head dimension,
            dtype or device, weights that are shared, quantised or wrapped by adapters, anything in
            a layer that is not known, a replacement whose result differs, or no encoder at all. The
            model is then as it was.

    Paper: ByteTransformer, arXiv 2210.03052.
    """
    if not isinstance(config, EncoderPlan):
        config = EncoderPlan(settings=config or PackedEncoderConfig())
    convert_compressed(module_of(model, "convert"), config, strict)
    return model


#: an encoder of a model -> its weights of few bits, by layer
Compressed = Mapping[nn.Module, list[CompressedParts]]


def convert_compressed(
    model: nn.Module, plan: EncoderPlan, strict: bool, compressed: Compressed | None = None
) -> None:
    """:func:`convert` with the weights of grouped and low-rank slots, which
    :func:`filbert.quantize` and :func:`filbert.factorize` make."""
    from .hugging_face.calling import drop_capture_hooks

    done = [(n, m) for n, m in model.named_modules() if isinstance(m, SwappedEncoder)]
    if other := [n for n, m in done if m.plan != plan]:
        raise ConvertError(
            f"{type(model).__name__} is already converted with other settings",
            [f"{name}: got {plan}" for name in other],
            "try filbert.revert(model) first",
        )
    candidates = list(_candidates(model))
    for candidate in candidates:
        candidate.reasons += _refusals(model, candidate, plan, compressed or {})
    bad = [c for c in candidates if c.reasons]
    swapped: list[_Candidate] = []
    if not (strict and bad):
        for candidate in candidates:
            if not candidate.reasons:
                candidate.reasons = _swap(model, candidate, plan, compressed or {})
                (bad if candidate.reasons else swapped).append(candidate)
    for candidate in candidates:
        _refused[candidate.module] = candidate.reasons
    if strict and bad:
        for candidate in swapped:
            _give_back(model, candidate.module)
        seen = [reason for candidate in bad for reason in candidate.say()]
        advice = "the model is unchanged"
        if len(candidates) > len(bad):
            advice += "; try strict=False to convert the other encoders"
        raise ConvertError(f"{type(model).__name__} cannot be converted", seen, advice)
    if strict and not candidates and not done:
        children = ", ".join(f"{n} ({type(m).__name__})" for n, m in model.named_children())
        raise ConvertError(
            f"{type(model).__name__} has no encoder that filbert knows",
            [f"seen: {children or 'no submodules'}; need a list of BERT-shaped layers"],
            "the model is unchanged",
        )
    if swapped:
        drop_capture_hooks(model)


def revert(model: Model) -> Model:
    """Puts the original encoders back, in place, with bitwise the weights they had; those of
    :func:`filbert.quantize` have the numbers that their codes stand for, and so have embeddings.

    Does nothing to a model that is not converted. Returns ``model``.

    Raises:
        ValueError: the packed encoder itself instead of the model that holds it.
        RuntimeError: parameters that were written in place since; the values written are gone.
    """
    from .hugging_face.calling import drop_capture_hooks

    module = module_of(model, "revert")
    if isinstance(module, SwappedEncoder):
        raise ValueError(
            "revert: got the packed encoder itself, need the model that holds it, because the "
            "encoder is replaced there"
        )
    swapped = {m for m in module.modules() if isinstance(m, SwappedEncoder)}
    for encoder in swapped:
        encoder.check_unwritten()
    for encoder in swapped:
        encoder.unpack_weights()
        encoder.original.train(encoder.training)
        _replace(module, encoder, encoder.original)
    tables = {m for m in module.modules() if isinstance(m, EmbeddingGrouped)}
    for table in tables:
        _replace(module, table, table.dense().train(table.training))
    if swapped:
        drop_capture_hooks(module)
    return model


def report(model: Any) -> Report:
    """What :func:`convert` made of every part of ``model``.

    Returns:
        An iterable of :class:`~filbert.conversion.reporting.ReportRow` (name, was, now, kernel,
        bytes, reason) that prints as an aligned table.
    """
    return Report(list(_rows("", module_of(model, "report"))))


def _rows(name: str, module: nn.Module) -> Iterator[ReportRow]:
    from .hugging_face.layers import looks_like_encoder, read_encoder

    if isinstance(module, SwappedEncoder):
        yield from rows_of_encoder(name, module)
        return
    below = list(module.modules())[1:]
    encoders = [m for m in below if isinstance(m, SwappedEncoder) or looks_like_encoder(m)]
    if looks_like_encoder(module) and not any(
        isinstance(m, SwappedEncoder) or not read_encoder(m)[1] for m in encoders
    ):
        why = _refused.get(module) or read_encoder(module)[1] or ["not converted yet"]
        yield left_alone(name, module, "; ".join(why))
        return
    if not encoders:
        if next(module.parameters(), None) is not None:
            yield left_alone(name, module, "not part of an encoder")
        return
    for child_name, child in module.named_children():
        yield from _rows(f"{name}.{child_name}" if name else child_name, child)


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """The encoders in ``model``, each once: those that can be read, and the outermost of those
    that cannot and hold none that can."""
    from .hugging_face.layers import looks_like_encoder, read_encoder

    found: list[_Candidate] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, SwappedEncoder):
            inside.update(module.modules())
        elif looks_like_encoder(module):
            reasons = read_encoder(module)[1]
            if not reasons:
                inside.update(module.modules())
            found.append(_Candidate(name, module, owner_of(model, name), reasons))
    for candidate in found:
        if not candidate.reasons:
            yield candidate
            continue
        mine = set(candidate.module.modules())
        holds_good = any(not c.reasons and c.module in mine for c in found)
        is_held = any(
            c is not candidate and c.reasons and candidate.module in set(c.module.modules())
            for c in found
        )
        if not holds_good and not is_held:
            yield candidate


def encoders_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the encoders in ``model`` that :func:`convert` would swap."""
    return [(found.name, found.module) for found in _candidates(model) if not found.reasons]


def owner_of(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest module above ``name`` that has a config, else its direct parent."""
    if not name:
        return None
    path = name.split(".")[:-1]
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    return next((m for m in above if hasattr(m, "config")), above[0])


def _refusals(
    model: nn.Module, candidate: _Candidate, plan: EncoderPlan, compressed: Compressed
) -> list[str]:
    """Every reason against an encoder that does not lie in the structure of its layers."""
    from .hugging_face.layers import read_encoder

    encoder, owner = candidate.module, candidate.owner
    reasons = []
    if not candidate.reasons:
        reasons += refusals_of(plan, read_encoder(encoder)[0], compressed.get(encoder))
    if encoder is model:
        reasons.append("an encoder cannot be replaced in itself; try the model that holds it")
    settings = getattr(owner, "config", None)
    for flag in ("is_decoder", "add_cross_attention", "output_attentions"):
        if getattr(settings, flag, False):
            reasons.append(f"the model's config has {flag}=True")
    dropout = max((m.p for m in encoder.modules() if isinstance(m, nn.Dropout)), default=0.0)
    if encoder.training and dropout > 0:
        reasons.append(
            f"it is in training mode with dropout {dropout:g}, and filbert is inference only; "
            "try model.eval()"
        )
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append(f"{name}.{key}")
    for parameter in encoder.parameters():
        if len(shared := users[id(parameter)]) > 1:
            reasons.append(f"a parameter is shared by {', '.join(shared)}")
    return reasons


def _swap(
    model: nn.Module, candidate: _Candidate, plan: EncoderPlan, compressed: Compressed
) -> list[str]:
    """Swaps one encoder and proves it. On failure everything is as before; returns the reasons."""
    from .hugging_face.calling import CallConvention
    from .hugging_face.layers import read_encoder

    encoder, owner = candidate.module, candidate.owner
    hidden = read_encoder(encoder)[0][0].query.in_features
    with torch.inference_mode(False), torch.no_grad():
        try:
            example = make_example(owner, encoder, hidden)
        except Exception as error:  # whatever it raises, it could not be compared
            return [f"the original could not be run on a small input ({_line(error)})"]
        convention = CallConvention.of(encoder, getattr(owner, "config", None))
        convention.output_type = type(example.output)
        own = compressed.get(encoder)
        if plan.settings.check:
            all_dense = EncoderPlan(settings=plan.settings)
            replacement = SwappedEncoder(encoder, read_encoder, convention, all_dense)
            if reasons := _disagreement(example, replacement):
                replacement.unpack_weights()
                return reasons
            if plan != all_dense:
                replacement.follow(plan, own)
        else:
            replacement = SwappedEncoder(encoder, read_encoder, convention, plan, own)
        _replace(model, encoder, replacement)
        return []


def _disagreement(example: Example, replacement: SwappedEncoder) -> list[str]:
    try:
        every_row = replacement.masked_rows == "compute"
        worst, allowed = difference(example, replacement, every_row)
    except Exception as error:  # whatever it raises, the packed encoder does not run like it
        return [f"the packed encoder could not be run on a small input ({_line(error)})"]
    if worst <= allowed:
        return []
    return [
        f"the packed encoder computes something else: on a small input its result differs by "
        f"{worst:.3g}, allowed {allowed:.3g}"
    ]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` everywhere ``old`` is registered."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _give_back(model: nn.Module, original: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, SwappedEncoder) and module.original is original:
            module.unpack_weights()
            _replace(model, module, original)
