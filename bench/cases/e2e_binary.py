"""A whole encoder whose weights are bits, beside BERT-base of the same shape in floats.

The models compute different things, so they cannot be checked against one answer. The float ones
are checked as in e2e; a binary one is proven against its own eager model when it is converted, and
has no row if that finds a difference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from .. import baselines, ours
from ..engines import Engine, Setup
from ..models import race_models
from ..results import Row
from ..runner import Options
from ..timing import Unavailable
from ..workloads import WORKLOADS as ALL
from .e2e import TOLERANCE

NAME = "e2e_binary"
ABOUT = "a whole binary encoder (BiBERT, BiT) beside HF SDPA and filbert's packed float encoder"
REFERENCE = "HF SDPA"
RATE = ("tokens_per_s", "tokens/s", 1.0)
WORKLOADS = {
    name: ALL[name] for name in ("bert-base-128", "bert-base-256", "bert-base-512", "tiny")
}
DEFAULT = ("bert-base-128",)


def _binary(scheme: str, ties: str = "zero") -> Callable[[Setup], Engine]:
    def build(setup: Setup) -> Engine:
        filbert = ours.compiled_filbert()
        student_of = importlib.import_module("filbert.compress.binarize").BinarizedBert.from_dense
        # Published models are of torch.sign; a two-valued one is trained with signs of one bit.
        student = student_of(setup.model, scheme=scheme, ties=ties)
        batch = setup.workload.batches()[0]
        if not student.calibrated:
            student.calibrate(batch.input_ids, batch.attention_mask)
        packed = filbert.binarize(student.eval())
        if packed.report.mismatches:
            raise Unavailable(f"{packed.report.mismatches} bits differ from the eager model")
        packed = packed.to(setup.device).to(setup.dtype)

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return packed(input_ids, attention_mask).last_hidden_state

        return Engine(forward, note=f"{packed.report.size.total / 2**20:.1f} MiB")

    return build


# No name is that of another model in older results: rows are paired by it.
BINARY = {
    "filbert BiBERT, published": _binary("bibert"),
    "filbert BiBERT, two-valued": _binary("bibert", ties="below"),
    "filbert BiT, published": _binary("bit"),
}
BUILDERS: dict[str, Callable[[Setup], Engine]] = {
    REFERENCE: baselines.hf_sdpa,
    "filbert": ours.filbert,
    **BINARY,
}


def run(options: Options) -> list[Row]:
    """Checks and times every contestant on every workload asked for."""
    return race_models(
        options, WORKLOADS, lambda dtype, workload: BUILDERS,
        reference=REFERENCE, tolerance=TOLERANCE, default=DEFAULT, exempt=frozenset(BINARY),
    )  # fmt: skip
