"""What the check leaves behind: one JSON file, one table, one log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cases import rate
from ..environment import caption
from ..report.table import markdown
from ..results import Report, from_dict, without_paths
from .aims import Verdict, judge
from .process import FAILED, PASSED, Step

SCHEMA = "filbert-gpu-check/2"
#: characters of one program's output that the log keeps, its end
LOGGED = 200_000


@dataclass
class Findings:
    """Everything known so far."""

    environment: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    #: what was measured, by the step that did
    measured: dict[str, Report] = field(default_factory=dict)
    #: what programs printed, by what they were for
    outputs: list[tuple[str, str]] = field(default_factory=list)
    #: of the libraries and of the tree, see :mod:`.earlier`
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def reports(self) -> list[Report]:
        return list(self.measured.values())

    def has(self, name: str) -> bool:
        """Whether the step is there already."""
        return any(step.name == name for step in self.steps)

    def keep(self, earlier: dict[str, Any] | None) -> str:
        """Takes over what an earlier report finished, and says how much that is, or why nothing.

        A step that was cut short or never begun is not finished.
        """
        if earlier is None or earlier.get("schema") != SCHEMA:
            return "nothing to resume: the folder holds no report of an earlier call"
        digests = earlier["digests"]
        for what, theirs, own in (
            ("another GPU", _gpu(earlier["environment"]), _gpu(self.environment)),
            ("other libraries", digests.get("libraries"), self.digests["libraries"]),
        ):
            if theirs != own:
                return f"nothing to resume: the earlier call was about {what}"
        same_tree = digests["tree"] == self.digests["tree"]
        for about in earlier["steps"]:
            step = Step(**about)
            finished = step.status == PASSED or (step.status == FAILED and not step.data.get("cut"))
            if not self.has(step.name) and finished and (step.status == PASSED or same_tree):
                step.data["kept"] = True
                self.steps.append(step)
        for data in earlier["bench"]:
            if self.has(name := data["step"]):
                self.add(name, from_dict(data, name))
        self.outputs.append(("earlier calls", earlier["log"]))
        kept = sum("kept" in step.data for step in self.steps)
        return f"{kept} steps of an earlier call are kept"

    def add(self, name: str, report: Report) -> None:
        """Keeps a step's report; the first that measured this GPU's ceilings tells the
        environment."""
        self.measured[name] = report
        ceilings = report.environment.get("gpu", {}).get("ceilings")
        if ceilings and "gpu" in self.environment:
            self.environment["gpu"].setdefault("ceilings", ceilings)

    @property
    def passed(self) -> bool:
        """Everything that ran passed, and something ran. Aims that were missed are no failure."""
        states = [step.status for step in self.steps]
        return PASSED in states and FAILED not in states

    @property
    def tests(self) -> dict[str, int]:
        """Counts over all test files."""
        counted = [step.data for step in self.steps if step.name.startswith("tests: ")]
        return {
            kind: sum(data.get(kind, 0) for data in counted)
            for kind in ("passed", "failed", "skipped")
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "environment": self.environment,
            "digests": self.digests,
            "tests": self.tests,
            "steps": [asdict(step) for step in self.steps],
            "aims": [asdict(verdict) for verdict in judge(self.reports)],
            "bench": [{"step": n, **report.to_dict()} for n, report in self.measured.items()],
        }

    def save(self, folder: Path) -> None:
        """Writes all three files, flat into the folder; called after every step."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        (folder / "gpu-check.json").write_text(text + "\n", encoding="utf-8")
        (folder / "gpu-check.md").write_text(self.markdown(), encoding="utf-8")
        parts = [f"===== {name}\n{text[-LOGGED:]}\n" for name, text in self.outputs]
        (folder / "gpu-check.log").write_text("\n".join(parts), encoding="utf-8")

    def summary(self) -> str:
        """Steps and aims."""
        counts = self.tests
        said = "Everything that ran passed." if self.passed else "Something failed."
        lines = ["# GPU check", "", said, ""]
        lines += [f"- {line}" for line in described(self.environment)]
        lines += [
            f"- tests: {counts['passed']} passed, {counts['failed']} failed, "
            f"{counts['skipped']} skipped",
            "",
            *step_table(self.steps),
            "",
            "## Aims",
            "",
            *aim_table(judge(self.reports)),
        ]
        return "\n".join(lines) + "\n"

    def markdown(self) -> str:
        """The summary, then every table that was measured."""
        tables = [markdown(report, rate(report)) for report in self.reports]
        return "\n".join([self.summary(), *tables])


def _gpu(about: dict[str, Any]) -> str:
    return str(about.get("gpu", {}).get("name", ""))


def described(about: dict[str, Any]) -> list[str]:
    """The environment in a few lines; empty before it is known."""
    if not about:
        return []
    lines = [caption(about)]
    if gpu := about.get("gpu"):
        lines.append(
            f"compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} "
            f"multiprocessors, {gpu['l2_bytes'] / 2**20:.0f} MiB of L2, "
            f"{gpu['memory_bytes'] / 2**30:.0f} GiB, CUDA {gpu['cuda']} in torch"
        )
        if ceilings := gpu.get("ceilings"):
            lines.append(
                f"measured: {ceilings['bytes_per_s'] * 1e-9:.0f} GB/s copied (read and written), "
                f"{ceilings['flop_per_s'] * 1e-12:.0f} TFLOP/s in a float16 matrix product"
            )
    return lines


def _cell(text: str) -> str:
    return without_paths(text).replace("|", "\\|")


def step_table(steps: Sequence[Step]) -> list[str]:
    lines = ["| step | result | seconds | |", "|---|---|---:|---|"]
    marks = {PASSED: "✓", FAILED: "✗"}
    for step in steps:
        earlier = ", earlier" if "kept" in step.data else ""
        result = f"{marks.get(step.status, '–')} {step.status}{earlier}"
        details = "<br>".join(_cell(line) for line in step.details)
        lines.append(f"| {step.name} | {result} | {step.seconds:.0f} | {details} |")
    return lines


def aim_table(verdicts: Sequence[Verdict]) -> list[str]:
    lines = ["| aim | need | got | |", "|---|---:|---:|---|"]
    for v in verdicts:
        said = f"{v.verdict}: {_cell(v.reason)}" if v.reason else v.verdict
        lines.append(f"| {v.what} | {v.need} | {v.got} | {said} |")
    return lines
