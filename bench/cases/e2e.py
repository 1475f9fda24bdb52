"""End to end: token ids in, hidden states (or one mean vector per text) out."""

from __future__ import annotations

from collections.abc import Callable

from .. import baselines, ours, runtimes
from ..engines import Engine, Setup
from ..models import race_models
from ..results import Row
from ..runner import Options, matching, on_gpu
from ..workloads import DEFAULT, WORKLOADS

NAME = "e2e"
ABOUT = "a whole encoder: HF eager and SDPA, buckets, torch.compile, ONNX Runtime, OpenVINO, "
ABOUT += "prototype, filbert; on a GPU also with CUDA graphs"
REFERENCE = "HF SDPA"
#: what a row has beside its times
RATE = ("tokens_per_s", "tokens/s", 1.0)

BASELINES: dict[str, Callable[[Setup], Engine]] = {
    "HF eager": baselines.hf_eager,
    REFERENCE: baselines.hf_sdpa,
    "SDPA, sorted buckets": baselines.sdpa_buckets,
    "torch.compile": baselines.torch_compile,
    "torch.compile, CUDA graphs": baselines.torch_compile_graphs,
    "ONNX Runtime": runtimes.onnx_runtime,
    "OpenVINO": runtimes.openvino("f32"),
    "prototype": baselines.prototype,
}
OURS: dict[str, Callable[[Setup], Engine]] = {
    "filbert": ours.filbert,
    "filbert (packed embed)": ours.filbert_embed,
    "filbert (captured)": ours.filbert_captured,
}
#: contestants that replay CUDA graphs; no row on the CPU, where there are none
GPU_ONLY = ("torch.compile, CUDA graphs", "filbert (captured)")
#: relative error of the worst row (or vector) against float32, after all layers: about ten times
#: and twice what Hugging Face's own float32 and bfloat16 show, and five times what its float16
#: shows (2e-3 at BERT-base), since GPU libraries may sum float16 products in float16; one
#: forgotten bias shows 1e-1
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 1e-2}


def builders(options: Options, dtype: str, pooled: bool) -> dict[str, Callable[[Setup], Engine]]:
    """The contestants asked for; the reference is always among them."""
    names = list(BASELINES)
    wanted = matching(names, options.baselines or ("*",), "--baseline")
    chosen = {n: BASELINES[n] for n in names if n in wanted or n == REFERENCE}
    if dtype == "bfloat16" and "OpenVINO" in chosen:
        chosen["OpenVINO"] = runtimes.openvino("bf16")
    chosen |= {n: b for n, b in OURS.items() if pooled or b is not ours.filbert_embed}
    return {n: b for n, b in chosen.items() if on_gpu(options.device) or n not in GPU_ONLY}


def run(options: Options) -> list[Row]:
    """Checks and times every contestant on every workload asked for."""
    return race_models(
        options, WORKLOADS,
        lambda dtype, workload: builders(options, dtype, workload.pooled),
        reference=REFERENCE, tolerance=TOLERANCE, default=DEFAULT,
    )  # fmt: skip
