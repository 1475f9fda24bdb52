"""`quantize`: a model's encoders with weights of a few bits, in place.

Paper: Q-BERT, arXiv 1909.05840.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...conversion.hugging_face.holders import module_of
from ...conversion.hugging_face.layers import read_encoder
from ...conversion.in_place import convert, convert_compressed, encoders_of, revert
from ...nn.build import CompressedParts
from ...nn.grouped.embedding import EmbeddingGrouped
from ...nn.grouped.weight import GroupedWeight
from ...nn.parts import LayerParts
from ...ops import FIELDS
from ...plan import EncoderPlan, LayerPlan, PackedEncoderConfig
from ..calibration import Moments, Sample, caller_of, input_moments
from ..names import first_that_fits
from .allocation import plan_bits
from .gptq import gptq
from .report import QuantizationReport, QuantizedRow, error_of
from .rounding import half_quadratic, round_to_nearest

__all__ = ["Bits", "group_of", "jobs_of", "plain_tables", "put_table", "quantize", "swap_in"]

Model = TypeVar("Model")
#: one number for all, or by the names of linear layers: the first pattern that fits
Bits = int | Mapping[str, int | None]
#: how codes are chosen -> (weight, bits, group) to codes; gptq takes moments too
METHODS: dict[str, Callable[[Tensor, int, int | None], GroupedWeight]] = {
    "nearest": lambda weight, bits, group: round_to_nearest(weight, bits, group, clip=False),
    "mse": round_to_nearest,
    "hqq": half_quadratic,
}
#: samples that sensitivity is measured on: each takes several backward passes
_PLANNED_ON = 8
#: parts that have one weight, or one product after the other, and so one kind
_TOGETHER = (("query", "key", "value"), ("out",), ("up", "down"))
_SLOTS = ("attention", "out", "feed_forward")


@dataclass(frozen=True)
class _Job:
    """One linear layer of an encoder."""

    name: str  # in the model
    encoder: str
    part: str  # of LayerParts
    layer: int
    linear: nn.Linear
    bits: int | None


def quantize(
    model: Model,
    bits: Bits = 4,
    *,
    avg_bits: float | None = None,
    megabytes: float | None = None,
    group: int | str | None = "auto",
    embed_bits: int | None = 8,
    method: str | None = None,
    calibration: Iterable[Sample] | None = None,
    tokenizer: Any = None,
    config: PackedEncoderConfig | None = None,
    progress: bool = False,
) -> Model:
    """Gives every BERT-shaped encoder in ``model`` weights of a few bits and packs it, in place.

    As :func:`filbert.convert`, with :class:`filbert.nn.LinearGrouped` for the linear layers: rows
    become 8-bit codes on the way in, sums are exact integers. What the model computes changes; its
    float weights become those that the codes stand for, and the old ones are gone. With calibration
    biases take what rounding does to the mean of a layer's results. Embedding tables become codes
    too. LayerNorms, poolers and heads stay as they are, and so does a table that is also the weight
    of a head.

    ::

        model = filbert.quantize(model, bits=4, calibration=texts)
        model = filbert.quantize(model, bits={"re:attention": 4, "re:.*": 3})

    Args:
        model: what :func:`filbert.convert` takes, in eval mode.
        bits: 2, 3, 4, 6 or 8 of all weights; or by name, where a key is a name or ``"re:"`` and a
            pattern that is found in it. The first that fits counts, and None leaves a weight as it
            is. Query, key and value have one number, and both weights of a feed-forward part have
            one or none of them.
        avg_bits: bits of a weight on average, in the place of ``bits``: 2, 3, 4 or 6 of each, as
            :func:`filbert.compress.quantize.plan_bits` chooses them by the trace of the Hessian on
            the first samples of ``calibration``.
        megabytes: likewise 10^6 bytes of all codes together.
        group: inputs that share a multiplier: 32, 64 or 128, or None for one scale for each output,
            as in Q-BERT. ``"auto"``: 64 up to 4 bits where it divides the inputs, else None.
        embed_bits: 8 or 4 of the embedding tables, rounded to nearest with a scale for each row; or
            None, which leaves them as they are.
        method: ``"nearest"`` (the range is that of the largest magnitude), ``"mse"`` (the range
            with the least squared error), ``"hqq"`` (half-quadratic, no data), or ``"gptq"``, which
            needs ``calibration``. GPTQ if there is one, else ``"mse"``.
        calibration: texts such as the model will read (some dozens), or arguments of the model.
            They are run one by one.
        tokenizer: for texts, where the model has none of its own.
        config: settings of the packed encoder.
        progress: show a bar.

    Returns:
        ``model``. :func:`quantization_report` says what became of each weight.

    Raises:
        ConvertError: whatever :func:`filbert.convert` refuses, before anything is changed.
        ValueError: bits, groups, a method or calibration that do not fit.

    Paper: Q-BERT, arXiv 1909.05840; GPTQ, arXiv 2210.17323.
    """
    module = module_of(model, "quantize")
    method = _method_of(method, calibration)
    if embed_bits not in (None, 4, 8):
        raise ValueError(f"embed_bits: got {embed_bits}, need 8, 4 or None")
    samples = None if calibration is None else list(calibration)
    # Whatever is refused is refused now, while the weights are what they were.
    convert(module, config)
    revert(module)
    if avg_bits is not None or megabytes is not None:
        bits = plan_bits(
            module, (samples or [])[:_PLANNED_ON], avg_bits=avg_bits, megabytes=megabytes,
            group=group if isinstance(group, int) else 64, tokenizer=tokenizer,
        ).bits  # fmt: skip
    encoders = [(name, encoder, read_encoder(encoder)[0]) for name, encoder in encoders_of(module)]
    jobs = {encoder: jobs_of(name, encoder, parts, bits) for name, encoder, parts in encoders}
    every = [job for own in jobs.values() for job in own if job.bits is not None]
    if not every:
        raise ValueError(f"bits: got {bits}, which names no weight of the model's encoders")
    for job in every:
        group_of(group, job)
    rows = []
    made: dict[nn.Linear, GroupedWeight] = {}
    moments: Mapping[nn.Linear, Moments] = {}
    for job in _with_bar(every, progress):
        if samples is not None and job.linear not in moments:
            # What the layer sees behind those that have few bits already.
            layer = [j.linear for j in every if (j.encoder, j.layer) == (job.encoder, job.layer)]
            moments = input_moments(layer, samples, caller_of(module, tokenizer))
        with torch.no_grad():
            made[job.linear], row = _quantized(job, method, group_of(group, job), moments)
        rows.append(row)
    _swap(module, encoders, jobs, made, config)
    if embed_bits is not None:
        tables = list(plain_tables(module))
        rows += [put_table(module, name, child, embed_bits) for name, child in tables]
    QuantizationReport(rows, method).attach(module)
    return model


def swap_in(
    model: nn.Module,
    bits: Mapping[str, int | None],
    made: Mapping[nn.Linear, GroupedWeight],
    config: PackedEncoderConfig | None = None,
) -> None:
    """Packs the encoders of a model whose linear layers have the numbers of ``made`` already.

    Args:
        model: in eval mode.
        bits: names of linear layers to bits; others stay floats.
        made: the weights of those in encoders, and perhaps of others.
        config: settings of the packed encoders.
    """
    encoders = [(name, encoder, read_encoder(encoder)[0]) for name, encoder in encoders_of(model)]
    jobs = {encoder: jobs_of(name, encoder, parts, bits) for name, encoder, parts in encoders}
    _swap(model, encoders, jobs, made, config)


def _swap(
    model: nn.Module,
    encoders: Sequence[tuple[str, nn.Module, Sequence[LayerParts]]],
    jobs: Mapping[nn.Module, Sequence[_Job]],
    made: Mapping[nn.Linear, GroupedWeight],
    config: PackedEncoderConfig | None,
) -> None:
    quantized = {}
    for _, encoder, parts in encoders:
        layers: list[CompressedParts] = [{} for _ in parts]
        for job in jobs[encoder]:
            if job.bits is not None:
                layers[job.layer][job.part] = made[job.linear]
        quantized[encoder] = layers
    plans = {encoder: _plan(jobs[encoder], len(parts), config) for _, encoder, parts in encoders}
    if len({str(plan.to_dict()) for plan in plans.values()}) != 1:
        raise ValueError("bits: got other kinds for one encoder than for another, need the same")
    convert_compressed(model, next(iter(plans.values())), True, quantized)


def plain_tables(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """Names and modules of the embeddings whose table nobody else holds."""
    users = Counter(
        id(p) for m in model.modules() for p in m.parameters(recurse=False) if p is not None
    )
    for name, module in list(model.named_modules()):
        for key, child in list(module.named_children()):
            plain = type(child) is nn.Embedding and child.max_norm is None
            if plain and users[id(child.weight)] == 1:
                yield (f"{name}.{key}" if name else key), child


def put_table(model: nn.Module, name: str, embedding: nn.Embedding, bits: int) -> QuantizedRow:
    """Puts a table of codes in the place of an embedding."""
    above, _, key = name.rpartition(".")
    with torch.no_grad():
        table = EmbeddingGrouped.of(embedding, bits)
        error = error_of(table.weight, embedding.weight)
    model.get_submodule(above)._modules[key] = table.train(embedding.training)
    return QuantizedRow(name, bits, None, table.nbytes, error, None)


def _method_of(method: str | None, calibration: Any) -> str:
    if method is None:
        return "mse" if calibration is None else "gptq"
    if method not in (*METHODS, "gptq"):
        raise ValueError(f"method: got {method!r}, need one of {(*METHODS, 'gptq')}")
    if (method == "gptq") != (calibration is not None):
        raise ValueError(
            f"method: got {method!r} {'with' if calibration else 'without'} calibration, need "
            "both 'gptq' and calibration, or neither"
        )
    return method


def _bits_of(name: str, bits: Bits) -> int | None:
    found: int | None = bits if isinstance(bits, int) else first_that_fits(name, bits)
    if found is not None and found not in FIELDS:
        raise ValueError(
            f"bits of {name}: got {found}, need one of {', '.join(map(str, FIELDS))}, or None"
        )
    return found


def jobs_of(name: str, encoder: nn.Module, layers: Sequence[LayerParts], bits: Bits) -> list[_Job]:
    """The linear layers of an encoder and their bits.

    Raises:
        ValueError: other bits than there are, or others where one number is needed.
    """
    names = {module: inner for inner, module in encoder.named_modules()}
    jobs = []
    for index, parts in enumerate(layers):
        for together in _TOGETHER:
            own = []
            for part in together:
                linear = getattr(parts, part)
                full = f"{name}.{names[linear]}" if name else names[linear]
                own.append(_Job(full, name, part, index, linear, _bits_of(full, bits)))
            given = {job.bits for job in own}
            same_kind = len({b is None for b in given}) == 1
            if not same_kind or (together[0] == "query" and len(given) != 1):
                need = "one number" if together[0] == "query" else "numbers for all or none"
                said = ", ".join(f"{job.bits} for {job.name}" for job in own)
                raise ValueError(f"bits: got {said}; need {need} of them")
            jobs += own
    return jobs


def group_of(group: int | str | None, job: _Job) -> int | None:
    """Inputs of a group of a layer, for the argument of :func:`quantize`."""
    if group != "auto":
        if group is not None and (not isinstance(group, int) or job.linear.in_features % group):
            raise ValueError(
                f"group: got {group!r} for {job.name} of {job.linear.in_features} inputs, need a "
                "divisor of them, None or 'auto'"
            )
        return group
    assert job.bits is not None
    return 64 if job.bits <= 4 and job.linear.in_features % 64 == 0 else None


def _quantized(
    job: _Job, method: str, group: int | None, moments: Mapping[nn.Linear, Moments]
) -> tuple[GroupedWeight, QuantizedRow]:
    """The weight of a job, which the layer has from now on, and what was lost."""
    assert job.bits is not None
    old = job.linear.weight.detach().float()
    bias: Tensor | None = job.linear.bias
    seen = moments.get(job.linear)
    if method != "gptq" or seen is None:
        weight = METHODS[method](old, job.bits, group)
    else:
        # What the mean of the rows makes of the error is a constant, which the bias takes.
        products = seen.products if bias is None else seen.centred
        weight = gptq(old.cpu(), products.cpu(), job.bits, group).to(old.device)
    new = weight.dequantize()
    error = error_of(new, old)
    of_results = None
    if seen is not None:
        moved, size = (_second_moment(w, seen, bias is not None) for w in (new - old, old))
        of_results = float((moved / size.clamp(min=1e-30)).sqrt())
        if bias is not None:
            bias.data += ((old - new).double() @ seen.mean).to(bias)
    job.linear.weight.data.copy_(new)
    return weight, QuantizedRow(job.name, job.bits, group, weight.nbytes, error, of_results)


def _second_moment(weight: Tensor, seen: Moments, centred: bool) -> Tensor:
    """The sum of squares of the results, or of what is left of them less their mean."""
    products = seen.centred if centred else seen.products
    return (weight.double() @ products * weight).sum().clamp(min=0)


def _plan(jobs: Sequence[_Job], layers: int, config: PackedEncoderConfig | None) -> EncoderPlan:
    kinds: dict[int, LayerPlan] = {}
    for index in range(layers):
        slots = {}
        for slot, together in zip(_SLOTS, _TOGETHER, strict=True):
            own = [job for job in jobs if job.layer == index and job.part in together]
            slots[slot] = "dense" if own[0].bits is None else "grouped"
        kinds[index] = LayerPlan(**slots)
    # The encoder was proven before its weights were changed.
    settings = replace(config or PackedEncoderConfig(), check=False)
    return EncoderPlan(layers=kinds, settings=settings)


def _with_bar(jobs: list[_Job], progress: bool) -> Iterator[_Job]:
    if not progress:
        yield from jobs
        return
    from tqdm import tqdm

    bar = tqdm(jobs, desc="quantize", unit="weight")
    for job in bar:
        bar.set_postfix_str(job.name.rpartition(".")[2])
        yield job
