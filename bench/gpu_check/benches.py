"""The cases that are timed, the important ones first, each in a process of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..cases import (
    attn_varlen,
    e2e,
    e2e_binary,
    e2e_grouped,
    ffn_lowrank,
    linear_binary,
    linear_grouped,
)  # fmt: skip
from ..results import Report, Row, load
from .libraries import Runner
from .process import FAILED, NOT_RUN, PASSED, Deadline, Ended, Step, run


@dataclass(frozen=True)
class Bench:
    """One call of ``python -m bench run``."""

    name: str
    case: str
    workloads: str
    #: seconds of samples for each workload
    budget_s: float
    #: seconds after which it is given up
    most_s: float
    #: a workload that a rehearsal can afford
    small: str
    #: what there is to compare with; everything if empty
    baselines: str = ""
    #: some of those are compiled for a minute or more
    compiles: bool = False
    #: seconds under which it is not begun
    least_s: float = 20.0
    #: run on the CPU, which passes for a GPU
    rehearsed: bool = False

    @property
    def step(self) -> str:
        return f"bench: {self.name}"

    @property
    def arguments(self) -> list[str]:
        found = ["run", self.case, "--device", "cuda"]
        if self.rehearsed:
            found += ["--dtype", "float32", "--workload", self.small, "--budget-s", "0.05"]
            found += ["--repeats", "2"]
        else:
            found += ["--dtype", "float16", "--workload", self.workloads]
            found += ["--budget-s", str(self.budget_s)]
        if self.baselines:
            found += ["--baseline", self.baselines]
        if self.compiles:
            found += ["--compile-limit-s", str(COMPILE_LIMIT_S)]
        return found

    def command(self, output: Path) -> list[str]:
        module = "bench.gpu_check.rehearsal" if self.rehearsed else "bench"
        return [sys.executable, "-m", module, *self.arguments, "--json", str(output)]


#: seconds that torch.compile gets for one model
COMPILE_LIMIT_S = 75


def plan() -> list[Bench]:
    """What is timed on a GPU, in the order of importance; what compiles comes last, since nobody
    knows how long that takes."""
    packed, hugging_face = "varlen_attn,flash-attn", "HF*,SDPA*"
    attention = dict(case=attn_varlen.NAME, budget_s=0.6, small="d32-max16")
    model = dict(case=e2e.NAME, small="tiny", least_s=30)
    return [
        Bench("attention, D=64", **attention, workloads="d64-max*", most_s=90, baselines=packed),
        Bench(
            "BERT-base, 16 texts", **model, workloads="bert-base-256", budget_s=6, most_s=80,
            baselines=hugging_face,
        ),
        Bench(
            "BERT-base, one query", **model, workloads="query-bert-base", budget_s=4, most_s=70,
            baselines="HF*",
        ),
        Bench("linear of bits", linear_binary.NAME, "*-m8192", 0.6, 60, "768x768-m16"),
        Bench(
            "linear of few bits", linear_grouped.NAME,
            "768x3072-m16,768x3072-m2048,768*-m8192,3072x768-m8192", 0.5, 60,
            "384x1536-m16"
        ),
        Bench(
            "feed-forward of low rank", ffn_lowrank.NAME, "r256-m16384,r256-m2048,r96-m16384", 0.5,
            45, "r96-m64"
        ),
        Bench("norm_residual", "norm_residual", "1024x768,16384x768", 0.6, 45, "1024x768"),
        Bench("bias_gelu", "bias_gelu", "1024x3072,16384x3072", 0.6, 45, "1024x3072"),
        Bench("gather_rows", "gather_rows", "*-128x*", 0.6, 45, "pack-16x256x768"),
        Bench(
            "BERT-base of bits", e2e_binary.NAME, "bert-base-256", 5, 90, "tiny", least_s=35
        ),
        Bench(
            "BERT-base of few bits", e2e_grouped.NAME, "bert-base-256", 5, 90, "tiny",
            "HF*,filbert*", least_s=35,
        ),
        Bench("attention, D=32", **attention, workloads="d32-max*", most_s=90, baselines=packed),
        Bench(
            "attention, FlexAttention", **attention, workloads="d64-max256", most_s=70,
            baselines="varlen_attn,Flex*", compiles=True, least_s=30,
        ),
        Bench(
            "BERT-base, 16 texts, torch.compile", **model | {"least_s": 45}, budget_s=6,
            workloads="bert-base-256", most_s=130, baselines="HF SDPA,torch.compile", compiles=True,
        ),
        Bench(
            "BERT-base, one query, torch.compile", **model | {"least_s": 45}, budget_s=4,
            workloads="query-bert-base", most_s=150, baselines="HF*,torch.compile*", compiles=True,
        ),
    ]  # fmt: skip


def rehearsal(every: bool = False) -> list[Bench]:
    """The plan as the CPU runs it, where it passes for a GPU: one bench of every case, or of four
    kinds of cases. What compiles is left out."""
    kinds = {attn_varlen.NAME, e2e.NAME, linear_binary.NAME, "gather_rows"}
    if every:
        kinds = {bench.case for bench in plan()}
    found = []
    for bench in plan():
        if not bench.compiles and bench.case in kinds:
            found.append(replace(bench, rehearsed=True, least_s=5))
            kinds -= {bench.case}
    return found


def _is_ours(row: Row) -> bool:
    return row.contestant.startswith("filbert")


def outcome(name: str, ended: Ended, report: Report | None) -> Step:
    """The step of one call: it fails where filbert is wrong, does not run, or nothing was told.

    A baseline that is wrong or absent is said, and is not filbert's failure.
    """
    if report is None:
        details = [f"{ended.how}, no report", *ended.last_lines()]
        cut = {"cut": True} if ended.cut else {}
        return Step(f"bench: {name}", FAILED, ended.seconds, details, cut)
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
        return Step(bench.step, NOT_RUN, details=["no time was left"]), None, ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        ended = runner(bench.command(path), limit, env)
        try:
            report = load(path)
        except (OSError, ValueError):
            report = None
    return outcome(bench.name, ended, report), report, ended.output
