"""End to end: token ids in, hidden states (or one mean vector per text) out."""

from __future__ import annotations

from collections.abc import Callable

from .. import baselines, ours, runtimes
from ..engines import Engine, Setup, contestant, reference_answer
from ..results import Row, unavailable
from ..runner import DTYPES, Options, caller_clock, check_then_time, matching, on_gpu, say
from ..timing import Contestant, Unavailable
from ..workloads import DEFAULT, WORKLOADS, Workload, model

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
    rows: list[Row] = []
    for name in matching(list(WORKLOADS), options.workloads or DEFAULT, "--workload"):
        try:
            workload = WORKLOADS[name]()
            bert = model(workload.model).to(options.device)
        except Unavailable as error:
            rows += [
                unavailable(name, dtype, who, REFERENCE, str(error))
                for dtype in options.dtypes
                for who in OURS
            ]
            continue
        padded = sum(b.input_ids.numel() for b in workload.batches())
        share = 1 - workload.tokens / padded
        say(f"{name}: {workload.tokens} tokens, {share:.0%} of the padded batches is padding")
        right = reference_answer(
            Setup(bert, workload, DTYPES["float32"], options.device, options.threads)
        )
        for dtype in options.dtypes:
            baselines.forget_compiled()
            setup = Setup(
                bert, workload, DTYPES[dtype], options.device, options.threads,
                options.compile_limit_s,
            )  # fmt: skip
            found = check_then_time(
                {
                    n: _bound(n, b, setup)
                    for n, b in builders(options, dtype, workload.pooled).items()
                },
                right,
                workload=name,
                dtype=dtype,
                reference=REFERENCE,
                tolerance=TOLERANCE[dtype],
                options=options,
                repeats=options.repeats or 15,
                budget_s=options.budget_s or 90.0,
                min_sample_s=0.05,
                pause_s=0.0 if on_gpu(options.device) else 0.02,
                clock=caller_clock(options),
            )
            _add_figures(found, workload, share)
            rows += found
    return rows


def _bound(name: str, build: Callable[[Setup], Engine], setup: Setup) -> Callable[[], Contestant]:
    return lambda: contestant(name, build(setup), setup)


def _add_figures(rows: list[Row], workload: Workload, padding_share: float) -> None:
    for row in rows:
        if "median_s" in row.figures:
            row.figures["tokens_per_s"] = workload.tokens / row.figures["median_s"]
            row.figures["padding_share"] = padding_share
