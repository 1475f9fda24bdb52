"""``python -m bench list | run | table | compare | plot``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .cases import CASES, rate
from .environment import Ticks, environment, weather
from .report.compare import compare
from .report.table import markdown
from .results import Report, load
from .runner import DTYPES, Options, ceilings_of, default_dtypes, dtypes_on, matching, say

#: every case, one after the other
ALL = "all"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench", description="Checks every contestant, then times it."
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name cases, workloads and contestants")

    run = commands.add_parser("run", help="check and time one case, or all")
    run.add_argument("case", choices=[*CASES, ALL])
    run.add_argument("--workload", type=_words, default=(), help="globs, comma separated")
    run.add_argument(
        "--dtype", type=_words,
        help=f"of {','.join(DTYPES)}; default: {','.join(default_dtypes('cpu'))} on cpu, "
        f"{','.join(default_dtypes('cuda'))} on cuda",
    )  # fmt: skip
    run.add_argument("--baseline", type=_words, default=(), help="globs, comma separated")
    run.add_argument("--only", default="*", help="glob on workload/dtype/contestant")
    run.add_argument("--repeats", type=_positive(int), help="rounds at most")
    run.add_argument(
        "--budget-s", type=_positive(float), help="seconds of samples per workload and dtype"
    )
    run.add_argument("--compile-limit-s", type=_positive(float), default=240.0)
    run.add_argument(
        "--wait-quiet-s", type=_positive(float), default=0.0,
        help="on a shared machine: wait this long at most, between rounds, for idle cores",
    )  # fmt: skip
    run.add_argument("--threads", type=_positive(int), help="default: what torch uses")
    run.add_argument("--device", default="cpu", help="cpu or cuda")
    run.add_argument(
        "--json", type=Path,
        help="write everything here, all samples included; with all, the folder of CASE.json",
    )  # fmt: skip
    run.add_argument(
        "--markdown", type=Path, help="write the table here too (it is printed anyway)"
    )

    table = commands.add_parser("table", help="print a JSON file as markdown")
    table.add_argument("file", type=Path)
    both = commands.add_parser("compare", help="two JSON files side by side")
    both.add_argument("a", type=Path)
    both.add_argument("b", type=Path)
    plot = commands.add_parser("plot", help="draw a JSON file")
    plot.add_argument("file", type=Path)
    plot.add_argument("-o", "--output", type=Path, required=True, help=".svg, .png or .pdf")
    return top


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _positive(kind: type) -> type:
    def read(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"got {text}, need more than 0")
        return value

    return read  # type: ignore[return-value]


def _dtypes(asked: tuple[str, ...] | None, device: str) -> tuple[str, ...]:
    if asked is None:
        return default_dtypes(device)
    known = dtypes_on(device)
    if "float16" in asked and "float16" not in known:
        raise ValueError(
            f"--dtype: got 'float16' on {device}, need one of {', '.join(known)}; "
            "float16 kernels run on CUDA only"
        )
    return tuple(matching(known, asked, "--dtype"))


def listing() -> str:
    lines = []
    for name, case in CASES.items():
        lines.append(f"{name}: {case.ABOUT}")
        lines.append(f"  workloads: {', '.join(case.WORKLOADS)}")
    return "\n".join(lines)


def _use(name: str) -> None:
    """Makes the device current, which events and operators without a device follow.

    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, need cpu, cuda or cuda:N; try cpu")
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"--device: got {name!r}, need a CUDA device that torch can see; try cpu")
    if device.index is None:  # set_device wants a number, and the current device is set
        return
    if device.index >= torch.cuda.device_count():
        raise ValueError(
            f"--device: got {name!r}, need one of {torch.cuda.device_count()} CUDA devices; "
            "try cuda:0"
        )
    torch.cuda.set_device(device.index)


def run_case(given: argparse.Namespace) -> Report:
    """Runs one case as the command line asks and returns everything measured.

    Raises:
        ValueError: a device, dtype or pattern that does not exist here.
    """
    _use(given.device)
    if given.threads:
        torch.set_num_threads(given.threads)
    threads = torch.get_num_threads()
    options = Options(
        workloads=given.workload,
        baselines=given.baseline,
        only=given.only,
        dtypes=_dtypes(given.dtype, given.device),
        repeats=given.repeats,
        budget_s=given.budget_s,
        device=given.device,
        threads=threads,
        compile_limit_s=given.compile_limit_s,
        wait_quiet_s=given.wait_quiet_s,
    )
    about = environment(given.device, threads)
    if (ceilings := ceilings_of(options)) is not None:
        about["gpu"]["ceilings"] = ceilings
    before = Ticks.now()
    rows = CASES[given.case].run(options)
    about |= weather(before, Ticks.now())
    recorded = {
        "workloads": list(options.workloads),
        "baselines": list(options.baselines),
        "only": options.only,
        "dtypes": list(options.dtypes),
        "repeats": options.repeats,
        "budget_s": options.budget_s,
    }
    return Report(given.case, about, recorded, rows)


def run_cases(given: argparse.Namespace) -> int:
    """Runs what was asked for, prints the tables and writes the files.

    Returns:
        1 if a case could measure nothing, else 0.
    """
    every = given.case == ALL
    texts, failed = [], 0
    for case in CASES if every else [given.case]:
        report = run_case(argparse.Namespace(**{**vars(given), "case": case}))
        texts.append(markdown(report, rate(report)))
        print(texts[-1])
        if given.json:
            file = given.json / f"{case}.json" if every else given.json
            file.parent.mkdir(parents=True, exist_ok=True)
            report.save(file)
            say(f"wrote {file}")
        if not any(row.status == "ok" for row in report.rows):
            say(f"{case}: nothing could be measured; the table says why")
            failed = 1
    if given.markdown:
        given.markdown.write_text("\n".join(texts), encoding="utf-8")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        if given.command == "list":
            print(listing())
        elif given.command == "run":
            return run_cases(given)
        elif given.command == "table":
            report = load(given.file)
            print(markdown(report, rate(report)))
        elif given.command == "compare":
            print(compare(load(given.a), load(given.b)))
        else:
            from .report.plot import plot

            report = load(given.file)
            plot(report, rate(report), given.output)
            say(f"wrote {given.output}")
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0
