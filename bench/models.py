"""Whole models over their workloads: what the end-to-end cases do the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import baselines, peak
from .engines import Engine, Setup, contestant, reference_answer
from .peak import Work, kind_of
from .results import Row, unavailable
from .runner import DTYPES, Options, caller_clock, check_then_time, matching, on_gpu, say
from .timing import Contestant, Unavailable
from .workloads import Workload, model

Builder = Callable[[Setup], Engine]


def flop(config: Any, workload: Workload) -> float:
    """Multiplications and additions of an encoder's products, on real tokens only: the linear
    layers for each token, and attention's two products for each pair of tokens of a text."""
    width, inner = config.hidden_size, config.intermediate_size
    linear = 2.0 * workload.tokens * (4 * width * width + 2 * width * inner)
    pairs = sum(len(ids) ** 2 for ids in workload.sequences)
    return config.num_hidden_layers * (linear + 4.0 * width * pairs)


def race_models(
    options: Options,
    workloads: Mapping[str, Callable[[], Workload]],
    builders: Callable[[str, Workload], Mapping[str, Builder]],
    *,
    reference: str,
    tolerance: Mapping[str, float],
    default: Sequence[str],
    exempt: frozenset[str] = frozenset(),
) -> list[Row]:
    """Checks and times every contestant on every workload and dtype asked for.

    Args:
        options: the command line.
        workloads: texts and their model, by name.
        builders: dtype and workload to who is raced.
        reference: the contestant that ratios are formed against.
        tolerance: of the check, by dtype.
        default: workloads where none were asked for.
        exempt: contestants that compute something else by their nature, and prove it themselves.
    """
    rows: list[Row] = []
    for name in matching(list(workloads), options.workloads or default, "--workload"):
        try:
            workload = workloads[name]()
            encoder = model(workload.model).to(options.device)
        except Unavailable as error:
            rows += [
                unavailable(name, dtype, reference, reference, str(error))
                for dtype in options.dtypes
            ]
            continue
        padded = sum(batch.input_ids.numel() for batch in workload.batches())
        padding = 1 - workload.tokens / padded
        say(f"{name}: {workload.tokens} tokens, {padding:.0%} of the padded batches is padding")
        first = Setup(encoder, workload, DTYPES["float32"], options.device, options.threads)
        right = reference_answer(first)
        for dtype in options.dtypes:
            baselines.forget_compiled()
            setup = Setup(
                encoder, workload, DTYPES[dtype], options.device, options.threads,
                options.compile_limit_s,
            )  # fmt: skip
            work = Work({kind_of(DTYPES[dtype]): flop(encoder.config, workload)})
            chosen = builders(dtype, workload)
            kinds = () if on_gpu(options.device) else work.kinds
            peaks = peak.yardsticks(kinds, options.threads)
            found = check_then_time(
                {n: _bound(n, b, setup) for n, b in chosen.items()} | peak.contestants(peaks),
                right,
                workload=name,
                dtype=dtype,
                reference=reference,
                tolerance=tolerance[dtype],
                options=options,
                repeats=options.repeats or 15,
                budget_s=options.budget_s or 90.0,
                min_sample_s=0.05,
                pause_s=0.0 if on_gpu(options.device) else 0.02,
                clock=caller_clock(options),
                exempt=exempt | {one.name for one in peaks},
            )
            for row in found:
                if row.contestant not in chosen or "median_s" not in row.figures:
                    continue
                row.figures["tokens_per_s"] = workload.tokens / row.figures["median_s"]
                row.figures["padding_share"] = padding
            works = {who: work for who in chosen if who not in exempt}
            peak.add_figures(found, works, peaks, "flop_per_s")
            rows += found
    return rows


def _bound(name: str, build: Builder, setup: Setup) -> Callable[[], Contestant]:
    return lambda: contestant(name, build(setup), setup)
