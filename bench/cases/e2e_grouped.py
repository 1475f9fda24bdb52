"""A whole encoder with weights of a few bits beside float ones and the int8 of other runtimes.

The models of few bits compute something else by their nature, and are checked loosely: that they
are the same model at all. What they lose is measured by ``quality``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from .. import baselines, ours, runtimes
from ..engines import Engine, Setup
from ..models import race_models
from ..results import Row
from ..runner import Options
from ..workloads import WORKLOADS as ALL
from .e2e import TOLERANCE

NAME = "e2e_grouped"
ABOUT = (
    "a whole encoder of 2 to 8 bits beside HF SDPA, filbert, and int8 of ONNX Runtime and OpenVINO"
)
REFERENCE = "HF SDPA"
RATE = ("tokens_per_s", "tokens/s", 1.0)
WORKLOADS = dict(ALL)
DEFAULT = ("bert-base-256", "bert-base-128", "query-*", "minilm-topics")


def _grouped(bits: int, group: int | str | None = "auto") -> Callable[[Setup], Engine]:
    def build(setup: Setup) -> Engine:
        quantize = ours._public("quantize")
        setup.model.set_attn_implementation("sdpa")
        model = quantize(copy.deepcopy(setup.model).to(setup.dtype), bits, group=group)

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

        return Engine(forward)

    return build


GROUPED = {
    "filbert 2 bits": _grouped(2),
    "filbert 3 bits": _grouped(3),
    "filbert 4 bits": _grouped(4),
    "filbert 4 bits, a scale for each output": _grouped(4, None),
    "filbert 6 bits": _grouped(6),
    "filbert 8 bits": _grouped(8),
}
#: int8 of others: other numbers, too
INT8 = {
    "ONNX Runtime, dynamic int8": runtimes.onnx_runtime_int8,
    "OpenVINO, int8": runtimes.openvino("f32", int8=True),
}
BUILDERS: dict[str, Callable[[Setup], Engine]] = {
    REFERENCE: baselines.hf_sdpa,
    "ONNX Runtime": runtimes.onnx_runtime,
    **INT8,
    "filbert": ours.filbert,
    **GROUPED,
}


def run(options: Options) -> list[Row]:
    """Checks and times every contestant on every workload asked for."""
    return race_models(
        options, WORKLOADS, lambda dtype, workload: BUILDERS,
        reference=REFERENCE, tolerance=TOLERANCE, default=DEFAULT,
        exempt=frozenset({*GROUPED, *INT8}),
    )  # fmt: skip
