"""`factorize`: a model's encoders with weights of low rank, in place.

Paper: FlashSVD, arXiv 2508.01506.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...conversion.hugging_face.holders import module_of
from ...conversion.hugging_face.layers import read_encoder
from ...conversion.in_place import convert, convert_compressed, encoders_of, revert
from ...nn.build import JOINT, CompressedParts
from ...nn.lowrank.factors import Factors, GroupedFactors
from ...nn.parts import LayerParts
from ...ops import LEAST_GAIN
from ...plan import EncoderPlan, LayerPlan, PackedEncoderConfig
from ..calibration import Moments, Sample, caller_of, input_moments
from ..names import first_that_fits
from ..quantize.rounding import round_to_nearest
from .allocation import largest_rank, plan_ranks
from .fisher import Loss, output_fisher
from .report import FactorizationReport, FactorizedRow
from .spectrum import Spectrum, spectrum_of

__all__ = ["Choice", "Job", "Ranks", "choose", "factorize", "swap_in"]

Model = TypeVar("Model")
#: one number for all, or by the names of linear layers: the first pattern that fits
Ranks = int | Mapping[str, int | None]
#: weights that are factorized, by slot, and the parts of a layer each is made of
_WEIGHTS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {JOINT: ("query", "key", "value")},
    "out": {"out": ("out",)},
    "feed_forward": {"up": ("up",), "down": ("down",)},
}


@dataclass(frozen=True)
class Job:
    """One weight, which may be that of several layers over the same input."""

    name: str  # of its first layer in the model
    encoder: nn.Module
    layer: int
    slot: str
    part: str
    linears: tuple[nn.Linear, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return sum(linear.out_features for linear in self.linears), self.linears[0].in_features

    @property
    def weight(self) -> Tensor:
        """``[N, K]``, float32."""
        return torch.cat([linear.weight.detach() for linear in self.linears]).float()


def factorize(
    model: Model,
    *,
    param_ratio: float | None = None,
    energy: float | None = None,
    ranks: Ranks | None = None,
    factor_bits: int | None = None,
    never_slower: bool = True,
    calibration: Iterable[Sample] | None = None,
    tokenizer: Any = None,
    loss: Loss | None = None,
    config: PackedEncoderConfig | None = None,
) -> Model:
    """Gives every BERT-shaped encoder in ``model`` weights of low rank and packs it, in place.

    As :func:`filbert.convert`, with two thin factors in the place of a weight; a feed-forward part
    runs as :func:`filbert.ffn_lowrank`, without an activation as wide as its inner dimension.
    Query, key and value are one weight. What the model computes changes: its float weights become
    the factors' products, and the old ones are gone. With calibration the factors keep what the
    weights *make of texts*, and biases take what is lost of its mean; without, they keep the
    weights.

    ::

        model = filbert.factorize(model, param_ratio=0.5, calibration=texts)

    Args:
        model: what :func:`filbert.convert` takes, in eval mode. On a GPU only the feed-forward part
            has a kernel for factors; the others are pairs of cuBLAS products there.
        param_ratio: numbers of all factors over numbers of all weights, between 0 and 1. Ranks are
            multiples of 16, and go where they keep most.
        energy: the share of its results' squares that each weight keeps at least; in the place of
            ``param_ratio``.
        ranks: likewise one rank for all weights, at most the smaller side of each; or by name,
            where a key is a name or ``"re:"`` and a pattern that is found in it. The first that
            fits counts, and None leaves a weight as it is. Query, key and value have the query's
            name.
        factor_bits: of the factors' codes, 2, 3, 4, 6 or 8, or None for numbers. Rows are 8-bit
            codes then, as after :func:`filbert.quantize`.
        never_slower: factors that gain less than
            :data:`filbert.ops.LEAST_GAIN` run as their product, a dense
            weight. The budgets choose no such ranks.
        calibration: texts such as the model will read (some dozens), or arguments of the model.
            They are run one by one.
        tokenizer: for texts, where the model has none of its own.
        loss: of what a call of the model returned, such as ``lambda out: out.loss`` where the
            calibration has labels. Errors of a weight's outputs then count by their Fisher
            information (FWSVD).
        config: settings of the packed encoder.

    Returns:
        ``model``. :func:`filbert.compress.lowrank.factorization_report` says what became of each
        weight. One that no rank with a gain is enough for stays as it is. Both weights of
        a feed-forward part have factors, or none has.

    Raises:
        ConvertError: whatever :func:`filbert.convert` refuses, before anything is changed.
        ValueError: no budget, or two; ranks or calibration that do not fit.

    Papers: FlashSVD, arXiv 2508.01506; SVD-LLM, arXiv 2403.07378; FWSVD, arXiv 2207.00112.
    """
    module = module_of(model, "factorize")
    choice = choose(
        module, param_ratio, energy, ranks, never_slower, calibration, tokenizer, loss, config
    )
    changed = [job for job in choice.jobs if choice.ranks[job.name] is not None]
    swap_in(choice, {job.name: choice.put(job, factor_bits) for job in changed})
    return model


@dataclass
class Choice:
    """What becomes of each weight of a model, before anything is changed.

    Attributes:
        module: the model.
        plan: of its encoders.
        layers: how many each encoder has.
        jobs: its weights.
        spectra, ranks: by the jobs' names; a rank is None where the weight stays as it is.
        products: the names of those whose factors' product runs in their place.
        moments: of what the linear layers read, where calibration was given.
    """

    module: nn.Module
    plan: EncoderPlan
    layers: dict[nn.Module, int]
    jobs: list[Job]
    spectra: dict[str, Spectrum]
    ranks: dict[str, int | None]
    products: set[str]
    moments: Mapping[nn.Linear, Moments]

    def put(self, job: Job, bits: int | None = None) -> Factors | GroupedFactors:
        """Gives the layers of a job what its factors stand for; the factors."""
        rank = self.ranks[job.name]
        assert rank is not None
        factors = self.spectra[job.name].factors(rank)
        if bits is None or job.name in self.products:
            return _put(job, factors, self.moments)
        seen = self.moments.get(job.linears[0])
        importance = None if seen is None else seen.products.diagonal().float()
        made = GroupedFactors(
            round_to_nearest(factors.a, bits, _group(job.shape[1]), importance=importance),
            round_to_nearest(factors.b, bits, _group(rank)),
        )
        _give(job, made.weight, self.moments)
        return made


def choose(
    module: nn.Module,
    param_ratio: float | None,
    energy: float | None,
    ranks: Ranks | None,
    never_slower: bool,
    calibration: Iterable[Sample] | None,
    tokenizer: Any,
    loss: Loss | None,
    config: PackedEncoderConfig | None,
) -> Choice:
    """The first half of :func:`factorize`, whose arguments these are."""
    if sum(given is not None for given in (param_ratio, energy, ranks)) != 1:
        raise ValueError("budget: need one of param_ratio, energy and ranks")
    # Whatever is refused is refused now, while the weights are what they were.
    convert(module, config)
    revert(module)
    encoders = [(name, encoder, read_encoder(encoder)[0]) for name, encoder in encoders_of(module)]
    jobs = [job for name, encoder, parts in encoders for job in _jobs_of(name, encoder, parts)]
    moments: Mapping[nn.Linear, Moments] = {}
    fisher: Mapping[nn.Linear, Tensor] = {}
    every = [linear for job in jobs for linear in job.linears]
    if calibration is not None:
        samples, call = list(calibration), caller_of(module, tokenizer)
        moments = input_moments(every, samples, call)
        if loss is not None:
            fisher = output_fisher(every, samples, call, loss)
    elif loss is not None:
        raise ValueError("loss: got one without calibration, need samples to compute it on")
    spectra = {job.name: _spectrum(job, moments, fisher) for job in jobs}
    chosen = _ranks(spectra, param_ratio, energy, ranks)
    for together in _slots(jobs):
        own = {job.name: chosen[job.name] for job in together}
        if None not in own.values():
            continue
        if param_ratio is not None and any(own.values()):  # a whole weight would exceed the budget
            own = {n: rank or largest_rank(spectra[n]) for n, rank in own.items()}
        chosen |= dict.fromkeys(own, None) if None in own.values() else own
    products: set[str] = set()
    if never_slower:
        products = {n for together in _slots(jobs) for n in _not_faster(together, chosen)}
    kinds = {n: None if n in products else rank for n, rank in chosen.items()}
    plans = [_plan([j for j in jobs if j.encoder is e], kinds, config) for _, e, _ in encoders]
    if any(plan != plans[0] for plan in plans):
        raise ValueError(
            "budget: leaves other slots dense in one encoder than in another; try ranks="
        )
    layers = {encoder: len(parts) for _, encoder, parts in encoders}
    return Choice(module, plans[0], layers, jobs, spectra, chosen, products, moments)


def _group(inputs: int) -> int | None:
    """Inputs of a group of a factor's codes."""
    return next((size for size in (64, 32) if inputs % size == 0), None)


def swap_in(choice: Choice, factors: Mapping[str, Factors | GroupedFactors]) -> None:
    """The second half: packs the model with factors by the jobs' names, whose products its weights
    are, and leaves the report."""
    made: dict[nn.Module, list[CompressedParts]] = {
        encoder: [{} for _ in range(count)] for encoder, count in choice.layers.items()
    }
    rows = []
    for job in choice.jobs:
        if job.name in factors and job.name not in choice.products:
            made[job.encoder][job.layer][job.part] = factors[job.name]
        rows.append(
            FactorizedRow.of(
                job.name, choice.spectra[job.name], choice.ranks[job.name],
                job.name in choice.products,
            )
        )  # fmt: skip
    convert_compressed(choice.module, choice.plan, True, made)
    FactorizationReport(rows).attach(choice.module)


def _jobs_of(name: str, encoder: nn.Module, layers: Sequence[LayerParts]) -> list[Job]:
    names = {module: inner for inner, module in encoder.named_modules()}
    jobs = []
    for index, parts in enumerate(layers):
        for slot, weights in _WEIGHTS.items():
            for part, of in weights.items():
                linears = tuple(getattr(parts, one) for one in of)
                inner = names[linears[0]]
                full = f"{name}.{inner}" if name else inner
                jobs.append(Job(full, encoder, index, slot, part, linears))
    return jobs


def _slots(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that have one kind."""
    slots: dict[tuple[int, int, str], list[Job]] = {}
    for job in jobs:
        slots.setdefault((id(job.encoder), job.layer, job.slot), []).append(job)
    return list(slots.values())


def _spectrum(
    job: Job, moments: Mapping[nn.Linear, Moments], fisher: Mapping[nn.Linear, Tensor]
) -> Spectrum:
    seen = moments.get(job.linears[0])
    if seen is None:
        return spectrum_of(job.weight)
    costs = torch.cat([fisher[linear] for linear in job.linears]) if fisher else None
    # What the mean of the rows makes of the error is a constant, which the bias takes.
    biased = all(linear.bias is not None for linear in job.linears)
    return spectrum_of(job.weight, seen.centred if biased else seen.products, costs)


def _ranks(
    spectra: Mapping[str, Spectrum], param_ratio: float | None, energy: float | None,
    ranks: Ranks | None,
) -> dict[str, int | None]:  # fmt: skip
    if ranks is None:
        return plan_ranks(spectra, param_ratio=param_ratio, energy=energy)
    return {
        name: None if (rank := _rank_of(name, ranks)) is None else min(rank, len(spectrum.energy))
        for name, spectrum in spectra.items()
    }


def _not_faster(jobs: Sequence[Job], chosen: Mapping[str, int | None]) -> list[str]:
    """The jobs of a slot whose factors are not worth being run as factors: all of them, or none."""
    dense = sum(math.prod(job.shape) for job in jobs)
    pairs = 0
    for job in jobs:
        rank = chosen[job.name]
        if rank is None:
            return []
        pairs += rank * sum(job.shape)
    return [job.name for job in jobs] if pairs * LEAST_GAIN > dense else []


def _rank_of(name: str, ranks: Ranks) -> int | None:
    found: int | None = ranks if isinstance(ranks, int) else first_that_fits(name, ranks)
    if found is not None and found < 1:
        raise ValueError(f"ranks: got {found} for {name}, need 1 or more, or None")
    return found


def _plan(
    jobs: Sequence[Job], chosen: Mapping[str, int | None], config: PackedEncoderConfig | None
) -> EncoderPlan:
    kinds: dict[int, dict[str, str]] = {}
    for job in jobs:
        kind = "dense" if chosen[job.name] is None else "lowrank"
        kinds.setdefault(job.layer, {})[job.slot] = kind
    # The encoder was proven before its weights were changed.
    settings = replace(config or PackedEncoderConfig(), check=False)
    layers = {index: LayerPlan(**slots) for index, slots in kinds.items()}
    return EncoderPlan(layers=layers, settings=settings)


def _put(job: Job, factors: Factors, moments: Mapping[nn.Linear, Moments]) -> Factors:
    """Gives the layers what the factors stand for; the factors in the layers' dtype."""
    dtype = job.linears[0].weight.dtype
    made = Factors(factors.a.to(dtype), factors.b.to(dtype))
    _give(job, Factors(made.a.float(), made.b.float()).weight, moments)
    return made


@torch.no_grad()
def _give(job: Job, product: Tensor, moments: Mapping[nn.Linear, Moments]) -> None:
    """Gives the layers their parts of a product, and their biases what is lost of the mean."""
    lost = job.weight - product
    sizes = [linear.out_features for linear in job.linears]
    for linear, new, less in zip(job.linears, product.split(sizes), lost.split(sizes), strict=True):
        seen = moments.get(linear)
        if seen is not None and linear.bias is not None:
            linear.bias.data += (less.double() @ seen.mean).to(linear.bias)
        linear.weight.data.copy_(new)
