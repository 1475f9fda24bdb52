"""What a run leaves behind: rows, environment, and the JSON file that holds both."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .check import MEASURE, Check
from .timing import Timing, quartiles, ratios

SCHEMA = "filbert-bench/1"


@dataclass
class Row:
    """One contestant on one workload. A row whose status is not ``ok`` carries no numbers."""

    workload: str
    dtype: str
    contestant: str
    #: the contestant that ratios are formed against
    reference: str
    #: ``ok``, ``unavailable`` (could not run here) or ``wrong`` (ran, and failed the check)
    status: str
    reason: str = ""
    note: str = ""
    error: float | None = None
    tolerance: float | None = None
    samples_s: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    inner: int = 1
    #: derived figures, in the units their names end in
    figures: dict[str, float] = field(default_factory=dict)
    #: where a line plot puts this row: ``panel``, ``x``, ``x_label``
    axis: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.workload}/{self.dtype}/{self.contestant}"

    def ratios_of(self, other: Row) -> list[float]:
        """How many times faster ``other`` is than this one, for every round that both ran in."""
        mine, theirs = (
            Timing(tuple(row.samples_s), tuple(row.rounds), row.inner) for row in (self, other)
        )
        return ratios(mine, theirs)

    def add_timing(self, own: Timing, reference: Timing | None) -> None:
        """Fills in the samples and everything that follows from them."""
        self.samples_s, self.rounds, self.inner = list(own.samples_s), list(own.rounds), own.inner
        first, third = own.quartiles_s
        self.figures |= {"median_s": own.median_s, "q1_s": first, "q3_s": third}
        if reference is None:
            return
        self.figures["ratio_of_medians"] = reference.median_s / own.median_s
        per_round = ratios(reference, own)
        if per_round:
            low, high = quartiles(per_round)
            self.figures |= {
                "ratio": statistics.median(per_round),
                "ratio_q1": low,
                "ratio_q3": high,
            }


def unavailable(workload: str, dtype: str, name: str, reference: str, reason: str) -> Row:
    return Row(workload, dtype, name, reference, "unavailable", without_paths(reason))


def checked(workload: str, dtype: str, name: str, reference: str, note: str, outcome: Check) -> Row:
    """A row that has its verdict, and no times yet."""
    status = "ok" if outcome.passed else "wrong"
    error = outcome.error if math.isfinite(outcome.error) else None
    return Row(
        workload, dtype, name, reference, status, outcome.reason, note, error, outcome.tolerance
    )


def without_paths(text: str) -> str:
    """Shortens absolute paths to their last part: results are published, folders are private."""
    text = re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)
    return re.sub(r"[A-Za-z]:(?:\\[\w.+@ -]+)+\\([\w.+@-]+)", r"\1", text)


@dataclass
class Report:
    """Everything one ``run`` measured."""

    case: str
    environment: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "case": self.case,
            "measure_of_error": MEASURE,
            "environment": self.environment,
            "options": self.options,
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # allow_nan=False: NaN is no JSON, and no figure of a checked row may be one.
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        # One sample list per line, not one sample.
        text = re.sub(r"\[\s+([-\d.e+,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> Report:
    """Reads a file written by :meth:`Report.save`.

    Raises:
        ValueError: the file is not such a report; the message says what it is instead.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from error
    return from_dict(data, path.name)


def from_dict(data: Any, name: str) -> Report:
    """The inverse of :meth:`Report.to_dict`; ``name`` says where the data are from.

    Raises:
        ValueError: they are no such report; the message says what they are instead.
    """
    found = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if found != SCHEMA:
        raise ValueError(
            f"{name}: got schema {found!r}, need {SCHEMA!r}; "
            "try a file written by `python -m bench run CASE --json FILE`"
        )
    rows = [Row(**row) for row in data["rows"]]
    return Report(data["case"], data["environment"], data["options"], rows)
