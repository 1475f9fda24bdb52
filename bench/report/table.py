"""Markdown tables: what the docs show and what ``run`` prints."""

from __future__ import annotations

from ..environment import caption
from ..results import Report, Row


def seconds(value: float) -> str:
    """Three figures and the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.9995 or unit == "µs":
            return f"{figure(value * factor)} {unit}"
    return ""


def figure(value: float) -> str:
    """Three significant figures, never in powers of ten."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _spread(row: Row) -> str:
    return f"{seconds(row.figures['q1_s'])} – {seconds(row.figures['q3_s'])}"


def _ratio(row: Row) -> str:
    f = row.figures
    if row.contestant == row.reference:
        return "1"
    if "ratio" not in f:
        return "–"
    return f"{figure(f['ratio'])} ({figure(f['ratio_q1'])} – {figure(f['ratio_q3'])})"


def _timed_cells(row: Row, rate: tuple[str, str, float], shares: list[str]) -> list[str]:
    f = row.figures
    return [
        seconds(f["median_s"]),
        _spread(row),
        str(len(row.samples_s)),
        _ratio(row),
        figure(f[rate[0]] * rate[2]) if rate[0] in f else "–",
        *(_share(f, name) for name in shares),
    ]


def _share(figures: dict[str, float], name: str) -> str:
    if name not in figures:
        return "–"
    if name.startswith("share"):
        return f"{figures[name]:.0%}"
    return figure(figures[name] * SCALES.get(name, 1.0))


def _error(row: Row) -> str:
    return "–" if row.error is None else f"{row.error:.1e}"


#: figures that get a column where any row has them, and the column's title
SHARES = {
    "ratio_to_per_sequence": "× SDPA per sequence",
    "ratio_to_varlen_attn": "× varlen_attn",
    "bytes_per_s": "GB/s",
    "share_of_peak": "of the peak",
    "share_of_floor": "of the floor",
    "share_of_copy": "of a copy",
    "share_of_clone": "of a clone",
    "share_of_reference": "of the reference",
}
#: factors to the units that the titles name
SCALES = {"bytes_per_s": 1e-9}


def _block(rows: list[Row], rate: tuple[str, str, float], timed: bool) -> list[str]:
    shares = [
        name for name in SHARES if name != rate[0] and any(name in row.figures for row in rows)
    ]
    titles = [SHARES[name] for name in shares]
    if timed:
        head = ["median", "quartiles", "n", f"× {rows[0].reference}", rate[1], *titles]
    else:
        head = [rate[1], *titles]
    lines = [
        "| " + " | ".join(["contestant", *head, "error", "checked"]) + " |",
        "|" + "---|" + "---:|" * (len(head) + 1) + "---|",
    ]
    for row in rows:
        if row.status == "ok" and row.figures:
            cells = (
                _timed_cells(row, rate, shares)
                if timed
                else [
                    figure(row.figures[rate[0]] * rate[2]),
                    *(_share(row.figures, name) for name in shares),
                ]
            )
            mark = f"✓ {row.note}".strip()
        else:
            cells = ["–"] * len(head)
            mark = f"✗ {row.reason or row.status}"
        mark = mark.replace("|", "\\|")
        lines.append("| " + " | ".join([row.contestant, *cells, _error(row), mark]) + " |")
    return lines


def markdown(report: Report, rate: tuple[str, str, float]) -> str:
    """The whole report: a table for each workload and dtype, and where it was measured."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        groups.setdefault((row.workload, row.dtype), []).append(row)
    lines = [f"## {report.case}", ""]
    for (workload, dtype), rows in groups.items():
        padding = max(row.figures.get("padding_share", 0.0) for row in rows)
        title = f"### {workload}, {dtype}"
        lines += [title + (f", {padding:.0%} padding" if padding else ""), ""]
        lines += [*_block(rows, rate, any(row.samples_s for row in rows)), ""]
    lines.append(f"{caption(report.environment)}.")
    for share, who in (("machines", "Other machines"), ("processes", "Other processes")):
        taken = report.environment.get(f"cpu_share_of_other_{share}", 0.0)
        if taken >= 0.02:
            lines.append(f"{who} took {taken:.0%} of the processor meanwhile.")
    ceilings = report.environment.get("gpu", {}).get("ceilings")
    if ceilings and any("share_of_floor" in row.figures for row in report.rows):
        lines.append(
            f"The floor is the time of the fewest operations at "
            f"{figure(ceilings['flop_per_s'] * 1e-12)} TFLOP/s or of the fewest bytes at "
            f"{figure(ceilings['bytes_per_s'] * 1e-9)} GB/s, whichever is longer; both rates were "
            "measured on this GPU, by a float16 matrix product and by a copy. "
            "Caches are emptied before every run."
        )
    if any("share_of_peak" in row.figures for row in report.rows):
        lines.append(
            "The peak is the time of the fewest operations or of the fewest bytes, whichever is "
            "longer, at the rate of what does nothing else: one instruction on registers, a copy "
            "that leaves the caches. These take their turns in the race."
        )
    if any(row.samples_s for row in report.rows):
        lines.append(
            "Ratios are medians (quartiles) of per-round ratios; "
            "all contestants ran in one process, in turns."
        )
    return "\n".join(lines) + "\n"
