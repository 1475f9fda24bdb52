"""Two runs side by side: what became faster, what became slower, what is noise."""

from __future__ import annotations

from ..results import Report, Row
from .table import figure, seconds

#: what has to be equal for seconds to be comparable; ratios are comparable anyway
SAME = (("cpu", "model"), ("gpu", "name"), ("threads",), ("versions", "torch"), ("device",))


def _at(about: dict, path: tuple[str, ...]) -> object:
    value: object = about
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def differences(a: Report, b: Report) -> list[str]:
    """Reasons why the seconds of the two reports should not be compared."""
    found = []
    for path in SAME:
        left, right = _at(a.environment, path), _at(b.environment, path)
        if left != right:
            found.append(f"{' '.join(path)}: {left} and {right}")
    return found


def verdict(a: Row, b: Row) -> str:
    """``faster`` or ``slower`` only where the middle halves of the samples do not even touch."""
    if b.figures["q3_s"] < a.figures["q1_s"]:
        return "faster"
    if b.figures["q1_s"] > a.figures["q3_s"]:
        return "slower"
    return "within noise"


def compare(a: Report, b: Report) -> str:
    """A markdown table of the rows that both reports have, then what only one of them has.

    Raises:
        ValueError: the reports are of different cases.
    """
    if a.case != b.case:
        raise ValueError(f"different cases: got {a.case!r} and {b.case!r}, need one; try two alike")
    left, right = ({row.key: row for row in report.rows} for report in (a, b))
    lines = [
        "| workload/dtype/contestant | a | b | a ÷ b | × reference, a | × reference, b | verdict |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for key in [key for key in left if key in right]:
        lines.append(_line(key, left[key], right[key]))
    lines.append("")
    for name, own, other in (("a", left, right), ("b", right, left)):
        lines += [f"only in {name}: {key}" for key in own if key not in other]
    reasons = differences(a, b)
    if reasons:
        lines.append("Compare ratios, not seconds: " + "; ".join(reasons) + ".")
    return "\n".join(lines).rstrip() + "\n"


def _line(key: str, a: Row, b: Row) -> str:
    peak = "peak_over_bytes"
    if peak in a.figures and peak in b.figures:
        left, right = a.figures[peak], b.figures[peak]
        cells = [f"{left / 2**20:.0f} MiB", f"{right / 2**20:.0f} MiB"]
        cells += [figure(left / right) if right else "–", *(_peak_share(r) for r in (a, b)), ""]
        return f"| {key} | " + " | ".join(cells) + " |"
    if "median_s" not in a.figures or "median_s" not in b.figures:
        states = [f"✗ {r.status}" if r.status != "ok" else "✓" for r in (a, b)]
        word = "" if a.status == b.status else f"{a.status} → {b.status}"
        return f"| {key} | {states[0]} | {states[1]} | – | – | – | {word} |"
    left, right = a.figures["median_s"], b.figures["median_s"]
    cells = [seconds(left), seconds(right), figure(left / right)]
    cells += [figure(r.figures["ratio"]) if "ratio" in r.figures else "–" for r in (a, b)]
    return f"| {key} | " + " | ".join([*cells, verdict(a, b)]) + " |"


def _peak_share(row: Row) -> str:
    share = row.figures.get("share_of_reference")
    return "–" if share is None else f"{share:.0%}"
