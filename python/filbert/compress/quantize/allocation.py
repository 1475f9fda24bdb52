"""Bits for each weight under a budget: more where the model minds.

Paper: Q-BERT, arXiv 1909.05840; HAWQ-V2, arXiv 1911.03852.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...conversion.hugging_face.holders import module_of
from ...conversion.hugging_face.layers import read_encoder
from ...conversion.in_place import encoders_of
from ...ops import FIELDS
from ..calibration import Sample, caller_of, input_moments
from .rounding import round_to_nearest
from .sensitivity import Loss, distance, hessian_traces, top_eigenvalues

__all__ = ["BitPlan", "allocate", "plan_bits"]

MEASURES = ("trace", "eigenvalue", "results")
#: parts of a layer that have one number of bits
_TOGETHER = (("query", "key", "value"), ("out",), ("up",), ("down",))


@dataclass(frozen=True)
class Choice:
    """Weights that have one number of bits.

    Attributes:
        names: of their linear layers in the model.
        weights: how many numbers.
        sensitivity: what a squared error of one of them costs.
        costs: bits -> ``sensitivity`` times the squared error of all.
    """

    names: tuple[str, ...]
    weights: int
    sensitivity: float
    costs: Mapping[int, float]


@dataclass(frozen=True)
class BitPlan:
    """What :func:`plan_bits` chose; ``bits`` is what :func:`filbert.quantize` takes.

    Attributes:
        choices: in the order of the model.
        chosen: bits of each.
        measure: of sensitivity.
    """

    choices: list[Choice]
    chosen: list[int]
    measure: str

    @property
    def bits(self) -> dict[str, int]:
        """Names of linear layers to bits."""
        return {
            name: bits
            for choice, bits in zip(self.choices, self.chosen, strict=True)
            for name in choice.names
        }

    @property
    def average(self) -> float:
        """Bits of a weight."""
        pairs = list(zip(self.choices, self.chosen, strict=True))
        return sum(c.weights * bits for c, bits in pairs) / sum(c.weights for c, _ in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of all codes."""
        pairs = zip(self.choices, self.chosen, strict=True)
        return sum(choice.weights * bits for choice, bits in pairs) // 8

    def plot(self, output: str | Path) -> None:
        """Draws the sensitivity of every weight and the bits it got, the layers from left to right.

        Args:
            output: a file; ``.svg``, ``.png`` or ``.pdf``.

        Raises:
            ImportError: no matplotlib.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        lines: dict[str, list[tuple[int, float, int]]] = {}
        for choice, bits in zip(self.choices, self.chosen, strict=True):
            # The name in the layer, and which layer it is: encoder.layer.3.output.dense
            index = next((int(p) for p in choice.names[0].split(".") if p.isdigit()), 0)
            part = choice.names[0].partition(f".{index}.")[2] or choice.names[0]
            label = part.removesuffix(".dense") + (" ..." if len(choice.names) > 1 else "")
            lines.setdefault(label, []).append((index, choice.sensitivity, bits))
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.subplots()
        for label, points in lines.items():
            where, what, _ = zip(*points, strict=True)
            axes.plot(where, what, marker="o", label=label)
            for index, sensitivity, bits in points:
                axes.annotate(
                    str(bits), (index, sensitivity), xytext=(0, 5), ha="center", fontsize=8,
                    textcoords="offset points",
                )  # fmt: skip
        if all(choice.sensitivity > 0 for choice in self.choices):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer (numbers are bits)")
        axes.set_ylabel(f"sensitivity, by {self.measure}")
        axes.set_title(f"{self.average:.2f} bits on average", loc="left", fontsize=10)
        axes.legend(fontsize=8)
        figure.savefig(str(output))

    def __str__(self) -> str:
        names = [
            choice.names[0] + (" ..." if len(choice.names) > 1 else "") for choice in self.choices
        ]
        width = max(map(len, names), default=4)
        lines = [f"{'name':<{width}}  bits     weights  sensitivity"]
        for name, choice, bits in zip(names, self.choices, self.chosen, strict=True):
            lines.append(
                f"{name:<{width}}  {bits:>4}  {choice.weights:>10,}  {choice.sensitivity:>11.3g}"
            )
        lines.append(
            f"{self.average:.2f} bits on average, {self.nbytes:,} bytes, by {self.measure}"
        )
        return "\n".join(lines)


def allocate(choices: Sequence[Choice], budget: float) -> list[int]:
    """Bits for each choice, so that costs are small and all weights take at most ``budget`` bits.

    All begin with the fewest bits. Then the step that saves most for each bit is taken, and the
    next, as long as there is room. A step may be of several sizes, so one that saves little is no
    obstacle before one that saves much.

    Args:
        choices: with costs of the same bits.
        budget: bits of all weights together.

    Raises:
        ValueError: a budget below the fewest bits.
    """
    options = sorted(choices[0].costs) if choices else []
    chosen = [options[0] for _ in choices]
    left = budget - sum(c.weights * options[0] for c in choices) if choices else 0.0
    if left < 0:
        need = sum(c.weights for c in choices) * options[0]
        raise ValueError(
            f"budget: got {budget:.0f} bits, need at least {need}, {options[0]} for each weight"
        )
    while True:
        best, gain = None, 0.0
        for index, choice in enumerate(choices):
            own = chosen[index]
            for bits in options[options.index(own) + 1 :]:
                price = choice.weights * (bits - own)
                saved = (choice.costs[own] - choice.costs[bits]) / price
                if price <= left and saved > gain:
                    best, gain = (index, bits), saved
        if best is None:
            return chosen
        index, bits = best
        left -= choices[index].weights * (bits - chosen[index])
        chosen[index] = bits


def plan_bits(
    model: Any,
    calibration: Sequence[Sample],
    *,
    avg_bits: float | None = None,
    megabytes: float | None = None,
    options: Sequence[int] = (2, 3, 4, 6),
    group: int | None = 64,
    measure: str = "trace",
    loss: Loss = distance,
    tokenizer: Any = None,
) -> BitPlan:
    """Chooses the bits of each weight of a model's encoders. The model stays as it is.

    ::

        plan = plan_bits(model, texts, avg_bits=3.0)
        filbert.quantize(model, plan.bits, calibration=texts)

    Args:
        model: what :func:`filbert.quantize` takes.
        calibration: a few texts, or arguments of the model.
        avg_bits: bits of a weight on average.
        megabytes: or 10^6 bytes of all codes together.
        options: bits to choose from.
        group: as :func:`filbert.quantize` will be given it.
        measure: of sensitivity. ``"trace"``: the mean trace of the Hessian (HAWQ-V2).
            ``"eigenvalue"``: mean and spread of its top eigenvalue (Q-BERT). ``"results"``: what
            the error does to the layer's own results on the calibration rows.
        loss: of what a call of the model returns, for the Hessian; the squared distance from its
            own output if not given.
        tokenizer: for texts, where the model has none of its own.

    Returns:
        The plan, which prints as a table.

    Raises:
        ValueError: no budget or two, an unknown measure, or no room for the fewest bits.

    Paper: Q-BERT, arXiv 1909.05840; HAWQ-V2, arXiv 1911.03852.
    """
    module = module_of(model, "plan_bits")
    if (avg_bits is None) == (megabytes is None):
        raise ValueError("budget: need avg_bits or megabytes, and not both")
    if not calibration:
        raise ValueError("calibration: got no sample, and sensitivity is measured on some")
    if measure not in MEASURES:
        raise ValueError(f"measure: got {measure!r}, need one of {MEASURES}")
    if bad := [bits for bits in options if bits not in FIELDS]:
        raise ValueError(f"options: got {bad}, need some of {', '.join(map(str, FIELDS))}")
    blocks = _blocks(module)
    if not blocks:
        raise ValueError("plan_bits: the model has no encoder that filbert knows")
    call = caller_of(module, tokenizer)
    costs, sensitivity = _costs(
        module, blocks, list(calibration), call, options, group, measure, loss
    )
    choices = [
        Choice(names, sum(m.weight.numel() for m in linears), sensitivity[key], costs[key])
        for key, (names, linears) in blocks.items()
    ]
    weights = sum(choice.weights for choice in choices)
    budget = avg_bits * weights if avg_bits is not None else 8e6 * (megabytes or 0.0)
    return BitPlan(choices, allocate(choices, budget), measure)


_Blocks = dict[str, tuple[tuple[str, ...], list[nn.Linear]]]


def _blocks(model: nn.Module) -> _Blocks:
    found: _Blocks = {}
    for _, encoder in encoders_of(model):
        names = {m: name for name, m in model.named_modules()}
        for parts in read_encoder(encoder)[0]:
            for together in _TOGETHER:
                linears = [getattr(parts, part) for part in together]
                own = tuple(names[linear] for linear in linears)
                found[own[0]] = (own, linears)
    return found


def _costs(
    model: nn.Module,
    blocks: _Blocks,
    samples: list[Sample],
    call: Any,
    options: Sequence[int],
    group: int | None,
    measure: str,
    loss: Loss,
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """What each number of bits costs each block, and the block's sensitivity."""
    weights = {name: [m.weight for m in linears] for name, (_, linears) in blocks.items()}
    if measure == "trace":
        sensitivity = hessian_traces(model, weights, samples, call, loss=loss)
    elif measure == "eigenvalue":
        sensitivity = top_eigenvalues(model, weights, samples, call, loss=loss)
    else:
        sensitivity = dict.fromkeys(blocks, 1.0)
    moments = {}
    if measure == "results":
        linears = [m for _, own in blocks.values() for m in own]
        moments = input_moments(linears, samples, call)
    costs: dict[str, dict[int, float]] = {}
    for name, (_, own) in blocks.items():
        costs[name] = {}
        for bits in options:
            total = 0.0
            for linear in own:
                dense = linear.weight.detach().float()
                size = group if group and bits <= 4 and dense.shape[1] % group == 0 else None
                lost = round_to_nearest(dense, bits, size).dequantize() - dense
                if measure == "results":
                    seen = moments[linear]
                    moved = lost.double() @ seen.centred * lost
                    total += float(moved.sum()) / max(seen.count, 1)
                else:
                    total += float(lost.square().sum())
            costs[name][bits] = total * max(sensitivity[name], 0.0)
    return costs, sensitivity
