"""The cases that are timed, the important ones first, each in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..cases import attn_varlen, e2e, e2e_binary, linear_binary
from ..results import Report, Row, load
from .libraries import Runner
from .process import FAILED, NOT_RUN, PASSED, Deadline, Ended, Step, run


@dataclass(frozen=True)
class Bench:
    """One call of ``python -m bench run``."""

    name: str
    arguments: tuple[str, ...]
    #: seconds after which it is given up
    most_s: float
    #: seconds under which it is not begun
    least_s: float = 20.0

    def command(self, output: Path) -> list[str]:
        return [sys.executable, "-m", "bench", "run", *self.arguments, "--json", str(output)]


def _on(case: str, workloads: str, device: str, dtype: str, budget_s: float) -> tuple[str, ...]:
    return (
        case, "--device", device, "--dtype", dtype, "--workload", workloads,
        "--budget-s", str(budget_s),
    )  # fmt: skip


def plan() -> list[Bench]:
    """What is timed on a GPU, in the order of importance."""

    def gpu(case: str, workloads: str, budget_s: float, *more: str) -> tuple[str, ...]:
        return (*_on(case, workloads, "cuda", "float16", budget_s), *more)

    packed = ("--baseline", "varlen_attn,flash-attn")
    compiled = ("--compile-limit-s", "75")
    return [
        Bench("attention, D=64", gpu(attn_varlen.NAME, "d64-max*", 0.8, *packed), 90),
        Bench(
            "BERT-base, 16 texts",
            gpu(e2e.NAME, "bert-base-256", 8, "--baseline", "HF*,SDPA*,torch.compile", *compiled),
            150,
            35,
        ),
        Bench(
            "BERT-base, one query",
            gpu(e2e.NAME, "query-bert-base", 5, "--baseline", "HF*,torch.compile*", *compiled),
            150,
            35,
        ),
        Bench("linear of bits", gpu(linear_binary.NAME, "*-m8192", 0.6), 60),
        Bench("norm_residual", gpu("norm_residual", "1024x768,16384x768", 0.6), 45),
        Bench("bias_gelu", gpu("bias_gelu", "1024x3072,16384x3072", 0.6), 45),
        Bench("gather_rows", gpu("gather_rows", "*-128x*", 0.6), 45),
        Bench("BERT-base of bits", gpu(e2e_binary.NAME, "bert-base-256", 5), 90, 35),
        Bench("attention, D=32", gpu(attn_varlen.NAME, "d32-max*", 0.6, *packed), 90),
        Bench(
            "attention, FlexAttention",
            gpu(attn_varlen.NAME, "d64-max256", 0.6, "--baseline", "varlen_attn,Flex*"),
            90,
            30,
        ),
    ]


def rehearsal() -> list[Bench]:
    """As many kinds of cases on the CPU, as small as they come."""

    def cpu(case: str, workloads: str, *more: str) -> tuple[str, ...]:
        return (*_on(case, workloads, "cpu", "float32", 0.05), "--repeats", "2", *more)

    return [
        Bench("attention", cpu(attn_varlen.NAME, "d32-max16"), 60, 5),
        Bench("gather_rows", cpu("gather_rows", "pack-16x256x768"), 60, 5),
        Bench("linear of bits", cpu(linear_binary.NAME, "768x768-m16"), 60, 5),
    ]


def _is_ours(row: Row) -> bool:
    return row.contestant.startswith("filbert")


def outcome(name: str, ended: Ended, report: Report | None) -> Step:
    """The step of one call: it fails where filbert is wrong, does not run, or nothing was told.

    A baseline that is wrong or absent is said, and is not filbert's failure.
    """
    if report is None:
        details = [f"{ended.how}, no report", *ended.last_lines()]
        return Step(f"bench: {name}", FAILED, ended.seconds, details)
    ours = [row for row in report.rows if _is_ours(row)]
    bad = [row for row in ours if row.status != "ok"]
    others = [row for row in report.rows if row.status != "ok" and not _is_ours(row)]
    details = [f"{sum(row.status == 'ok' for row in report.rows)} of {len(report.rows)} rows"]
    if not ours:
        details.append("no row of filbert's")
    # The same reason for every workload is one piece of news.
    said = (f"{row.contestant}: {row.reason or row.status}" for row in (*bad, *others))
    details += dict.fromkeys(said)
    good = bool(ours) and not bad and ended.status == 0
    return Step(f"bench: {name}", PASSED if good else FAILED, ended.seconds, details)


def time_one(
    bench: Bench, deadline: Deadline, env: Mapping[str, str], runner: Runner = run
) -> tuple[Step, Report | None, str]:
    """One call's step, its report, and everything it printed."""
    limit = deadline.limit(bench.most_s, bench.least_s)
    if limit is None:
        return Step(f"bench: {bench.name}", NOT_RUN, details=["no time was left"]), None, ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        ended = runner(bench.command(path), limit, env)
        try:
            report = load(path)
        except (OSError, ValueError):
            report = None
    return outcome(bench.name, ended, report), report, ended.output
