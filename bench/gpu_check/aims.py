"""What the CUDA kernels were written to reach, and whether they did."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from ..cases import attn_varlen, e2e, ffn_lowrank, linear_binary
from ..cases.attn_varlen import Mix
from ..gpu_attention import VARLEN_ATTN
from ..results import Report, Row

MET, MISSED, NOT_RUN = "met", "missed", "not run"
DTYPE = "float16"


class NotMeasured(Exception):
    """The reports lack a row that the aim needs; the message says which, and why."""


@dataclass(frozen=True)
class Aim:
    """One claim to check."""

    what: str
    need: float
    measure: Callable[[Sequence[Report]], float]
    #: True: more than ``need``; False: ``need`` is enough
    strictly: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Verdict:
    """An aim and what became of it."""

    what: str
    need: str
    got: str
    verdict: str
    reason: str = ""


def row(reports: Iterable[Report], case: str, workload: str, who: str) -> tuple[Report, Row]:
    """The first timed row of a contestant, and its report.

    Raises:
        NotMeasured: there is none.
    """
    reason = "not timed"
    for report in reports:
        if report.case != case:
            continue
        for found in report.rows:
            if (found.workload, found.dtype, found.contestant) != (workload, DTYPE, who):
                continue
            if found.status == "ok" and found.samples_s:
                return report, found
            reason = found.reason or found.status
    raise NotMeasured(f"{workload}, {who}: {reason}")


def ratio(reports: Sequence[Report], case: str, workload: str, who: str, reference: str) -> float:
    """How many times faster than the reference, as the median over rounds that both ran in.

    Both have to be of one report: different processes had different weather.
    """
    for report in reports:
        try:
            own, other = (row([report], case, workload, one)[1] for one in (who, reference))
        except NotMeasured:
            continue
        if rounds := other.ratios_of(own):
            return statistics.median(rounds)
    for one in (who, reference):
        row(reports, case, workload, one)  # raises, and says why it has no time
    raise NotMeasured(f"{workload}: {who} and {reference} met in no round")


def share_of_bandwidth(reports: Sequence[Report], workload: str) -> float:
    """The rate at which the fewest possible bytes moved, over that of a copy on this GPU."""
    report, own = row(reports, attn_varlen.NAME, workload, "filbert")
    ceilings = report.environment.get("gpu", {}).get("ceilings")
    if not ceilings or "bytes_per_s" not in own.figures:
        raise NotMeasured(f"{workload}: its report has no measured bandwidth")
    return own.figures["bytes_per_s"] / ceilings["bytes_per_s"]


def _attention(maximum: int) -> str:
    return Mix(64, maximum, True).on("cuda").name


def aims() -> list[Aim]:
    """All of them."""
    found = [
        Aim(
            f"attention float16 D=64 H=12, mixed lengths up to {maximum}, against varlen_attn",
            1.0,
            partial(
                ratio, case=attn_varlen.NAME, workload=_attention(maximum), who="filbert",
                reference=VARLEN_ATTN,
            ),
            strictly=True,
        )
        for maximum in (64, 128, 256, 512)
    ]  # fmt: skip
    found += [
        Aim(
            f"attention float16 D=64 H=12, mixed lengths up to {maximum}, of the memory bandwidth",
            0.8,
            partial(share_of_bandwidth, workload=_attention(maximum)),
            percent=True,
        )
        for maximum in attn_varlen.MAXIMA
        if maximum < 128
    ]
    for reference, need in ((e2e.REFERENCE, 1.9), ("torch.compile", 1.5)):
        found.append(
            Aim(
                f"BERT-base float16, 16 texts up to 256 tokens, against {reference}",
                need,
                partial(
                    ratio, case=e2e.NAME, workload="bert-base-256", who="filbert",
                    reference=reference,
                ),
            )
        )  # fmt: skip
    found.append(
        Aim(
            "BERT-base float16, one text of 32 tokens, captured, against HF eager",
            4.0,
            partial(
                ratio, case=e2e.NAME, workload="query-bert-base", who="filbert (captured)",
                reference="HF eager",
            ),
        )
    )  # fmt: skip
    found += [
        Aim(
            f"linear layer of bits, {shape}, 8192 rows, bits out, against F.linear float16",
            5.0,
            partial(
                ratio, case=linear_binary.NAME, workload=f"{shape}-m8192",
                who=linear_binary.BITS_OUT, reference=linear_binary.REFERENCE,
            ),
        )
        for shape in ("768x768", "768x3072", "3072x768")
    ]  # fmt: skip
    found.append(
        Aim(
            "feed-forward part of rank 256, 16384 rows, against F.linear dense, float16",
            1.3,
            partial(
                ratio, case=ffn_lowrank.NAME, workload="r256-m16384", who="filbert",
                reference=ffn_lowrank.REFERENCE,
            ),
        )
    )  # fmt: skip
    return found


def judge(reports: Sequence[Report]) -> list[Verdict]:
    """Every aim with its verdict; one whose rows are missing says which."""
    found = []
    for aim in aims():
        sign = "> " if aim.strictly else "≥ "
        need = sign + _shown(aim, aim.need)
        try:
            got = aim.measure(reports)
        except NotMeasured as error:
            found.append(Verdict(aim.what, need, "–", NOT_RUN, str(error)))
            continue
        met = got > aim.need if aim.strictly else got >= aim.need
        found.append(Verdict(aim.what, need, _shown(aim, got), MET if met else MISSED))
    return found


def _shown(aim: Aim, value: float) -> str:
    return f"{value:.1%}" if aim.percent else f"{value:.2f}×"
