"""Quantization-aware fine-tuning: a model that computes with weights of few bits while it trains.

Paper: Q-BERT, arXiv 1909.05840; straight-through gradients, arXiv 1308.3432.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import ops
from ...conversion.hugging_face.holders import module_of
from ...conversion.hugging_face.layers import read_encoder
from ...conversion.in_place import encoders_of
from ...nn.grouped.weight import GroupedWeight
from ...plan import PackedEncoderConfig
from ..gradients import straight_through
from .conversion import Bits, group_of, jobs_of, plain_tables, put_table, swap_in
from .report import QuantizationReport, QuantizedRow, error_of
from .rounding import Steps, round_to, spread, steps_of

__all__ = ["StraightThrough"]


class _FewBits(nn.Module):
    """A parametrization: the numbers that the codes of a weight stand for."""

    scale: Tensor
    multiplier: Tensor | None

    def __init__(self, weight: Tensor, bits: int, group: int | None, refresh: int) -> None:
        super().__init__()
        self.bits, self.group, self.refresh, self.calls = bits, group, refresh, 0
        self._choose(weight)

    def _choose(self, weight: Tensor) -> None:
        steps = steps_of(weight.detach().float(), self.bits, self.group)
        self.register_buffer("scale", steps.scale, persistent=False)
        self.register_buffer("multiplier", steps.multiplier, persistent=False)

    def quantized(self, weight: Tensor) -> GroupedWeight:
        steps = Steps(self.scale, self.multiplier)
        levels = round_to(weight.float(), spread(steps, weight.shape[1]), self.bits)
        return steps.weight(levels, self.bits)

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            if self.calls and self.calls % self.refresh == 0:
                self._choose(weight)
            self.calls += 1
        wide = weight.detach().float()
        step = spread(Steps(self.scale, self.multiplier), weight.shape[1])
        levels = round_to(wide, step, self.bits)
        # Beyond the ends of the range a change of a number changes nothing.
        passes = (wide - levels * step).abs() <= 0.5 * step.abs()
        return straight_through(weight, (levels * step).to(weight), passes)


def _as_codes(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook before a linear layer: its rows are what their 8-bit codes stand for."""
    x: Tensor = args[0]
    rows = x.detach().reshape(-1, x.shape[-1])
    codes, scale, zero = ops.quantize_rows(rows)
    numbers = (codes.float() - zero[:, None].float()) * scale[:, None]
    return straight_through(x, numbers.to(x).view(x.shape)), *args[1:]


class _RowsOfCodes:
    """The hook behind an embedding: its rows are what their codes in a table stand for, with a
    scale for each row."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, module: nn.Module, args: tuple[Any, ...], rows: Tensor) -> Tensor:
        flat = rows.detach().reshape(-1, rows.shape[-1])
        codes, scale = ops.pack_table(flat, self.bits)
        numbers = ops.unpack_table(codes, scale, flat.shape[1])
        return straight_through(rows, numbers.to(rows).view(rows.shape))


class StraightThrough:
    """Fine-tunes a model for weights of few bits.

    While this lasts, the linear layers of the model's encoders compute with rounded weights and
    8-bit rows, as :func:`filbert.quantize` would leave them, and gradients pass the rounding
    straight through to float weights, which any optimizer trains. :meth:`finish` packs what came
    of it.

    ::

        training = StraightThrough(model, bits=2)
        for batch in batches:                 # model.train(), any loss, any optimizer
            loss(model(**batch)).backward()
            ...
        training.finish()                     # the model is as filbert.quantize makes it

    Args:
        model: as for :func:`filbert.quantize`; on any device, and changed in place. Make the
            optimizer after this: parameters are the same objects under other names.
        bits: as for :func:`filbert.quantize`.
        group: likewise.
        embed_bits: likewise.
        refresh: training steps after which the ranges of codes are chosen again, those with the
            least squared error.

    Raises:
        ValueError: bits or groups that do not fit.

    Paper: Q-BERT, arXiv 1909.05840.
    """

    def __init__(
        self,
        model: Any,
        bits: Bits = 4,
        *,
        group: int | str | None = "auto",
        embed_bits: int | None = 8,
        refresh: int = 50,
    ) -> None:
        if refresh < 1:
            raise ValueError(f"refresh: got {refresh}, need 1 step or more")
        self.model = module_of(model, "StraightThrough")
        encoders = [(name, e, read_encoder(e)[0]) for name, e in encoders_of(self.model)]
        every = [job for name, e, parts in encoders for job in jobs_of(name, e, parts, bits)]
        self._jobs = [job for job in every if job.bits is not None]
        if not self._jobs:
            raise ValueError(f"bits: got {bits}, which names no weight of the model's encoders")
        groups = [group_of(group, job) for job in self._jobs]  # refused before anything is changed
        self._embed_bits = embed_bits
        self._tables = [] if embed_bits is None else list(plain_tables(self.model))
        self._hooks: list[Any] = []
        for job, size in zip(self._jobs, groups, strict=True):
            assert job.bits is not None
            made = _FewBits(job.linear.weight, job.bits, size, refresh)
            parametrize.register_parametrization(job.linear, "weight", made, unsafe=True)
            self._hooks.append(job.linear.register_forward_pre_hook(_as_codes))
        for _, table in self._tables:
            assert embed_bits is not None
            self._hooks.append(table.register_forward_hook(_RowsOfCodes(embed_bits)))

    def cancel(self) -> None:
        """Gives the model its own modules back, with the float weights as they are trained."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for linear in (job.linear for job in self._jobs):
            if parametrize.is_parametrized(linear):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
                # As it was made: the weight before the bias, for optimizers that go by the order.
                own = linear._parameters
                own["bias"] = own.pop("bias")

    def finish(self, config: PackedEncoderConfig | None = None) -> Any:
        """Packs the trained weights, with the codes that they had in the last step.

        Args:
            config: settings of the packed encoder.

        Returns:
            The model, in eval mode; :func:`filbert.quantization_report` tells its bytes. Errors in
            it are those of rounding the float weights that were trained.
        """
        made: dict[nn.Linear, GroupedWeight] = {}
        chosen: dict[nn.Linear, Any] = {
            job.linear: job.linear.parametrizations["weight"][0]  # type: ignore[index]
            for job in self._jobs
        }
        self.cancel()
        self.model.eval()
        rows = []
        with torch.no_grad():
            for job in self._jobs:
                old = job.linear.weight.detach().float()
                weight = made[job.linear] = chosen[job.linear].quantized(old)
                new = weight.dequantize()
                job.linear.weight.data.copy_(new)
                group, error = chosen[job.linear].group, error_of(new, old)
                rows.append(QuantizedRow(job.name, weight.bits, group, weight.nbytes, error, None))
        bits: dict[str, int | None] = {job.name: job.bits for job in self._jobs}
        swap_in(self.model, bits, made, config)
        if self._embed_bits is not None:
            for name, child in self._tables:
                rows.append(put_table(self.model, name, child, self._embed_bits))
        QuantizationReport(rows, "training").attach(self.model)
        return self.model
