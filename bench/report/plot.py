"""Draws a report: bars where contestants differ, lines where a length does.

No pyplot: a figure of its own needs no display and leaves no global state behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..environment import caption
from ..peak import PREFIX
from ..results import Report, Row
from .table import figure, seconds

#: Okabe and Ito's palette, which people with any kind of colour vision can tell apart
OURS = "#D55E00"
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#000000", "#F0E442")
MARKERS = "osD^vPX*"


def plot(report: Report, rate: tuple[str, str, float], output: Path) -> None:
    """Writes the picture; the suffix of ``output`` (.svg, .png, .pdf) decides the format.

    Raises:
        ValueError: matplotlib is missing, the suffix is unknown, or the report has no row.
    """
    shown = [row for row in report.rows if not row.contestant.startswith(PREFIX)]
    if not shown:
        raise ValueError("the report has no rows to draw; try another run")
    if output.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise ValueError(f"-o: got {output.suffix or 'no suffix'!r}, need .svg, .png or .pdf")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("matplotlib is not installed; try pip install matplotlib") from error
    lines = any(row.axis for row in shown)
    groups = _groups(shown, lines)
    columns = min(len(groups), 2)
    depth = -(-len(groups) // columns)
    tallest = max(len(rows) for rows in groups.values())
    height = 3.4 if lines else max(1.9, 0.36 * tallest + 1.0)
    picture = Figure(figsize=(6.4 * columns, height * depth + 0.9), layout="constrained")
    cells = picture.subplots(depth, columns, squeeze=False, sharey=lines)
    colours = _colours(shown)
    for cell, (title, rows) in zip(cells.flat, groups.items(), strict=False):
        (_lines if lines else _bars)(cell, rows, colours, rate)
        cell.set_title(title, loc="left", fontsize=10, fontweight="bold")
        cell.spines[["top", "right"]].set_visible(False)
    for cell in list(cells.flat)[len(groups) :]:
        cell.remove()
    if lines:
        # Every contestant once, whichever panels it is missing from.
        named = {
            label: handle
            for cell in cells.flat
            for handle, label in zip(*cell.get_legend_handles_labels(), strict=True)
        }
        picture.legend(
            named.values(), named.keys(), loc="outside upper left", ncols=len(named), frameon=False
        )
    picture.supxlabel(caption(report.environment), fontsize=7, color="#444444", x=0.01, ha="left")
    # Text stays text, and no date: the same report gives the same file.
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "filbert",
        "font.family": "DejaVu Sans",
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style):
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        picture.savefig(output, dpi=150, metadata=undated.get(output.suffix.lower()))


def _groups(rows: list[Row], lines: bool) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        name = row.axis.get("panel", row.workload) if lines else row.workload
        groups.setdefault(f"{name}, {row.dtype}", []).append(row)
    return groups


def _colours(rows: list[Row]) -> dict[str, str]:
    """One colour for a contestant in all panels; filbert's own are vermilion."""
    names = list(dict.fromkeys(row.contestant for row in rows))
    others = [name for name in names if not name.startswith("filbert")]
    found = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}
    return {name: found.get(name, OURS) for name in names}


def _bars(
    cell: Any, rows: list[Row], colours: dict[str, str], rate: tuple[str, str, float]
) -> None:
    """One bar for each contestant: its median, quartiles as whiskers, speed-up in words."""
    timed = any("median_s" in row.figures for row in rows)
    key, scale = ("median_s", 1.0) if timed else (rate[0], rate[2])
    values = [row.figures[key] * scale for row in rows if key in row.figures]
    # Whiskers have to fit too, and so does the text that stands behind them.
    reach = max([*values, *(row.figures.get("q3_s", 0.0) for row in rows)], default=1.0)
    longest = reach or 1.0
    unit, factor = _unit(longest) if timed else (rate[1], 1.0)
    for place, row in enumerate(rows):
        if key not in row.figures:
            reason = row.reason if len(row.reason) <= 58 else row.reason[:57] + "…"
            cell.text(
                0.01, place, f"✗ {reason}", va="center", fontsize=7, color="#666666",
                transform=cell.get_yaxis_transform(),
            )  # fmt: skip
            continue
        value = row.figures[key] * scale * factor
        ours = row.contestant.startswith("filbert")
        # Baselines share one grey: the eye is to find ours, and names stand beside the bars.
        cell.barh(place, value, color=colours[row.contestant] if ours else "#9FB4C7", height=0.7)
        end = value
        if timed:
            low, high = row.figures["q1_s"] * factor, row.figures["q3_s"] * factor
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            cell.errorbar(value, place, xerr=spread, color="#222222", capsize=2, linewidth=1)
            end = max(value, high)
        cell.text(end, place, f"  {_bar_label(row, timed, value)}", va="center", fontsize=8)
    cell.set_yticks(range(len(rows)), [row.contestant for row in rows], fontsize=8)
    cell.set_ylim(len(rows) - 0.4, -0.6)
    cell.set_xlim(0, longest * factor * 1.32)
    cell.set_xlabel(f"median time ({unit}), less is better" if timed else unit, fontsize=8)
    cell.tick_params(axis="x", labelsize=8)


def _bar_label(row: Row, timed: bool, value: float) -> str:
    if not timed:
        share = row.figures.get("share_of_reference")
        return figure(value) + (f"  ({share:.0%})" if share is not None else "")
    label = seconds(row.figures["median_s"])
    if row.contestant != row.reference and "ratio" in row.figures:
        label += f"  ({figure(row.figures['ratio'])}×)"
    return label


def _unit(longest: float) -> tuple[str, float]:
    if longest >= 1:
        return "s", 1.0
    return ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)


def _lines(
    cell: Any, rows: list[Row], colours: dict[str, str], rate: tuple[str, str, float]
) -> None:
    """One line for each contestant over the length, with quartiles as a band."""
    names = list(dict.fromkeys(row.contestant for row in rows))
    for place, name in enumerate(names):
        mine = sorted(
            (r for r in rows if r.contestant == name and rate[0] in r.figures),
            key=lambda r: r.axis["x"],
        )
        if not mine:
            continue
        x = [row.axis["x"] for row in mine]
        y = [row.figures[rate[0]] * rate[2] for row in mine]
        # The rate is work over time, so its quartiles are those of the time turned round.
        low = [v * r.figures["median_s"] / r.figures["q3_s"] for v, r in zip(y, mine, strict=True)]
        high = [v * r.figures["median_s"] / r.figures["q1_s"] for v, r in zip(y, mine, strict=True)]
        colour = colours[name]
        cell.plot(x, y, color=colour, marker=MARKERS[place % len(MARKERS)], label=name, ms=5)
        cell.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    places = sorted({row.axis["x"] for row in rows})
    cell.set_xscale("log", base=2)
    cell.set_xticks(places, [str(place) for place in places])
    cell.set_ylim(bottom=0)
    cell.set_xlabel(rows[0].axis.get("x_label", ""), fontsize=8)
    cell.set_ylabel(f"{rate[1]}, more is better", fontsize=8)
    cell.grid(axis="y", color="#dddddd", linewidth=0.6)
    cell.tick_params(labelsize=8)
    if not cell.lines:
        reasons = "; ".join(dict.fromkeys(row.reason for row in rows if row.reason))
        cell.text(0.5, 0.5, f"✗ {reasons[:60]}", transform=cell.transAxes, ha="center", fontsize=8)
