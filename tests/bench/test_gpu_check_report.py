"""What `make gpu-check` reads from tests, what it times, its aims, and what it leaves behind."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from bench.cases import CASES, attn_varlen, e2e, e2e_grouped
from bench.gpu_check import aims, benches, earlier, rehearsal, report, testing
from bench.gpu_check.process import FAILED, NOT_RUN, PASSED, Deadline, Ended, Step
from bench.results import Report, Row
from bench.timing import Timing

from bench import cli, environment, results
from stand_in_gpu import CEILING, stand_in

ROOT = Path(__file__).parents[2]


def ended(status=0, output="", cut=False, seconds=3.0):
    return Ended(status, output, seconds, cut)


# Tests


JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="1" skipped="1"
 tests="4" time="1.0">
<testcase classname="tests.test_attn_varlen" name="test_lengths[ragged-cuda]" time="0.1"/>
<testcase classname="tests.test_attn_varlen" name="test_any_scale[cuda-2.0]" time="0.1">
<failure message="AssertionError: error 3 in /srv/someone/filbert/tests/tolerances.py&#10;more">
trace</failure></testcase>
<testcase classname="tests.test_attn_varlen" name="test_opcheck[cuda]" time="0.1">
<error message="RuntimeError: CUDA error: an illegal memory access">trace</error></testcase>
<testcase classname="tests.test_attn_varlen" name="test_large[cuda]" time="0.1">
<skipped message="no room">skip</skipped></testcase>
</testsuite></testsuites>
"""


@pytest.fixture
def junit(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    return path


def test_junit_counts_and_first_lines(junit):
    found = testing.read_junit(junit)
    assert str(found) == "1 passed, 2 failed, 1 skipped"
    assert found.failed == [
        "test_attn_varlen::test_any_scale[cuda-2.0]: AssertionError: error 3 in tolerances.py",
        "test_attn_varlen::test_opcheck[cuda]: RuntimeError: CUDA error: an illegal memory access",
    ]


def test_a_junit_file_that_is_absent_or_cut_short_counts_nothing(junit):
    junit.write_text(JUNIT[:400])
    assert testing.read_junit(junit) is None
    assert testing.read_junit(junit.with_name("absent.xml")) is None


GOOD = testing.Counts(tests=5, skipped=1)
BAD = testing.Counts(tests=20, failures=15, failed=[f"test{i}: wrong" for i in range(15)])


@pytest.mark.parametrize(
    ("how", "counts", "status", "details"),
    [
        (ended(0), GOOD, PASSED, ["4 passed, 0 failed, 1 skipped"]),
        (ended(1), BAD, FAILED, ["5 passed, 15 failed", "test0: wrong", "and 3 more"]),
        (ended(5), testing.Counts(), FAILED, ["no test of this backend"]),
        (ended(0), testing.Counts(tests=1, skipped=1), FAILED, ["0 passed"]),
        (ended(2, cut=True), GOOD, FAILED, ["4 passed", "the rest did not run"]),
        (ended(-11, "Fatal Python error\n"), None, FAILED, ["signal SIGSEGV", "Fatal Python"]),
        (ended(4), GOOD, FAILED, ["ended with status 4"]),
    ],
    ids=["good", "bad", "none", "skipped", "cut", "crash", "usage"],
)
def test_outcomes_of_a_test_file(how, counts, status, details):
    step = testing.outcome("test_x.py", how, counts)
    assert step.status == status
    text = "\n".join(step.details)
    for detail in details:
        assert detail in text


def test_every_test_that_can_run_on_a_gpu_is_in_a_file_of_the_check(request):
    """Whatever pytest collected beside this file; all of them where that is the whole suite."""
    found = testing.files()
    assert {
        "ops/test_attn_varlen.py",
        "ops/test_linear_binary.py",
        "conversion/test_capture.py",
    } <= set(found)
    tests = ROOT / "tests"
    collected = {
        item.path.relative_to(tests).as_posix()
        for item in request.session.items
        if "backend" in item.fixturenames
    }
    assert collected <= set(found)
    if len(request.session.items) > 1000:
        assert collected == set(found)


def test_a_test_file_that_is_absent_or_has_no_time_is_told():
    step, _ = testing.run_file("test_of_another_day.py", "cuda", 60.0, {})
    assert step.status == NOT_RUN
    assert testing.run_file("conversion/test_capture.py", "cuda", None, {})[0].status == NOT_RUN


@pytest.mark.parametrize(
    ("how", "status", "details"),
    [
        (ended(0, "...\n322 calls, 0 wrong, built for sm 90\n"), PASSED, ["322 calls, 0 wrong"]),
        (ended(1, "a: error 1\n9 calls, 1 wrong\n"), FAILED, ["status 1", "a: error 1"]),
        (ended(-9, "", cut=True), FAILED, ["stopped after"]),
    ],
    ids=["good", "wrong", "cut"],
)
def test_every_kernel_runs_once_without_a_sanitizer(how, status, details):
    asked = []
    step, _ = testing.exercise("cuda", Deadline(400), {}, lambda *a: asked.append(a) or how)
    assert step.status == status
    assert all(any(d in line for line in step.details) for d in details)
    assert bool(step.data.get("cut")) == how.cut
    ((command, _, _),) = asked
    assert command[1:] == ["-m", "bench.gpu_check.exercise", "--device", "cuda"]
    assert testing.exercise("cuda", Deadline(20), {})[0].status == NOT_RUN


# Benches


def test_every_planned_bench_asks_for_what_exists():
    for bench in benches.plan():
        command = bench.command(Path("x.json"))
        given = cli.parser().parse_args(command[3:])
        assert command[1:3] == ["-m", "bench"]
        assert given.device == "cuda"
        assert given.dtype == ("float16",)
        case = CASES[given.case]
        known = {
            "attn_varlen": list(attn_varlen.GPU_BUILDERS),
            "e2e": list(e2e.BASELINES),
            "e2e_grouped": list(e2e_grouped.BUILDERS),
        }.get(given.case, [])
        for patterns, names in ((given.workload, list(case.WORKLOADS)), (given.baseline, known)):
            for pattern in patterns:
                matching = [n for n in names if fnmatchcase(n.lower(), pattern.lower())]
                assert matching, (bench.name, pattern)
        assert bench.least_s < bench.most_s


def asked(bench):
    return cli.parser().parse_args(bench.command(Path("x"))[3:])


def test_the_plan_measures_every_aim_and_fits_the_time_in_order():
    given = [asked(bench) for bench in benches.plan()]
    workloads = {
        name
        for one in given
        for pattern in one.workload
        for name in CASES[one.case].WORKLOADS
        if fnmatchcase(name, pattern)
    }
    assert {"d64-max16", "d64-max64", "d64-max512", "d32-max256"} <= workloads
    assert {"bert-base-256", "query-bert-base"} <= workloads
    assert {one.case for one in given} == set(CASES) - {
        "memory",
        "linear_dense",
        "footprint",
        "quality",
        "peak",
        "attn_lowrank",
        "linear_lowrank",
        "e2e_lowrank",
        "memory_lowrank",
        "quality_lowrank",
    }  # of the CPU
    assert [one.case for one in given[:3]] == ["attn_varlen", "e2e", "e2e"]
    # Nobody knows how long a compiler takes: the two models that need one come last.
    slow = [any("torch.compile" in baseline for baseline in one.baseline) for one in given]
    assert slow == [False] * (len(given) - 2) + [True] * 2
    assert len({bench.step for bench in benches.plan()}) == len(given)


@pytest.mark.parametrize("bench", benches.rehearsal(every=True), ids=lambda bench: bench.name)
def test_every_case_of_the_plan_runs_as_on_a_gpu(bench, tmp_path):
    """The whole road of ``--device cuda``, from the command line to the file, on the CPU."""
    path = tmp_path / "report.json"
    with rehearsal.no_gpu_needed():
        assert cli.main(bench.command(path)[3:]) == 0
    made = results.load(path)
    assert made.environment["gpu"]["name"] == rehearsal.GPU.name
    assert made.environment["gpu"]["ceilings"]["flop_per_s"] > 0
    step = benches.outcome(bench.name, ended(), made)
    assert step.status == PASSED, step.details
    if bench.case == "e2e":
        assert "filbert (captured)" in {row.contestant for row in made.rows if row.samples_s}


def bench_row(who, status="ok", reason="", workload="w", dtype="float16", case_samples=(1.0,)):
    row = Row(workload, dtype, who, "base", status, reason)
    if status == "ok":
        own = Timing(tuple(case_samples), tuple(range(len(case_samples))), 1)
        row.add_timing(own, None)
    return row


def made_report(*rows, case="attn_varlen"):
    about = environment.environment("cpu", 2)
    return Report(case, about, {}, list(rows))


@pytest.mark.parametrize(
    ("how", "rows", "status", "details"),
    [
        (ended(0), [bench_row("filbert"), bench_row("base")], PASSED, ["2 of 2 rows"]),
        (
            ended(0), [bench_row("filbert"), bench_row("x", "unavailable", "not here")], PASSED,
            ["1 of 2 rows", "x: not here"],
        ),
        (
            ended(0), [bench_row("filbert", "wrong", "wrong result"), bench_row("base")], FAILED,
            ["filbert: wrong result"],
        ),
        (
            ended(0), [bench_row("filbert (captured)", "unavailable", "no capture()")], FAILED,
            ["filbert (captured): no capture()"],
        ),
        (ended(0), [bench_row("base")], FAILED, ["no row of filbert's"]),
        (ended(1), [bench_row("filbert")], FAILED, ["1 of 1 rows"]),
        (ended(2, "bench: --device: got 'cuda'\n"), None, FAILED, ["no report", "--device"]),
    ],
    ids=["good", "baseline", "wrong", "absent", "nobody", "status", "crash"],
)  # fmt: skip
def test_outcomes_of_a_bench(how, rows, status, details):
    step = benches.outcome("x", how, None if rows is None else made_report(*rows))
    assert step.status == status
    text = "\n".join(step.details)
    for detail in details:
        assert detail in text


def test_a_bench_that_leaves_no_report_or_has_no_time_is_told():
    bench = benches.plan()[0]
    step, found, output = benches.time_one(bench, Deadline(400), {}, lambda *_: ended(1, "boom\n"))
    assert (step.status, found, output) == (FAILED, None, "boom\n")
    assert "boom" in step.details
    step, found, _ = benches.time_one(bench, Deadline(20), {})
    assert (step.status, found) == (NOT_RUN, None)


# Aims


def attention_report(times, bandwidth=0.0):
    """d64-max64: samples of each contestant, and filbert's bytes per second."""
    rows = [
        bench_row(who, workload="d64-max64-32k", case_samples=samples)
        for who, samples in times.items()
    ]
    for row in rows:
        row.figures["bytes_per_s"] = bandwidth
    found = made_report(*rows)
    found.environment["gpu"] = {"name": "G", "driver": "1", "ceilings": dict(CEILING)}
    return found


def verdicts(*reports):
    return {v.what: v for v in aims.judge(list(reports))}


AGAINST_VARLEN = "attention float16 D=64 H=12, mixed lengths up to 64, against varlen_attn"
OF_BANDWIDTH = "attention float16 D=64 H=12, mixed lengths up to 64, of the memory bandwidth"
CAPTURED = "BERT-base float16, one text of 32 tokens, captured, against HF eager"


@pytest.mark.parametrize(
    ("theirs", "verdict", "got"),
    [
        ([2.0, 20.0], "met", "2.00×"),
        ([1.0, 10.0], "missed", "1.00×"),
        ([0.5, 5.0], "missed", "0.50×"),
    ],
)
def test_attention_has_to_be_faster_than_varlen_attn_not_as_fast(theirs, verdict, got):
    found = verdicts(attention_report({"filbert": [1.0, 10.0], "varlen_attn": theirs}))
    assert (found[AGAINST_VARLEN].verdict, found[AGAINST_VARLEN].got) == (verdict, got)
    assert found[AGAINST_VARLEN].need == "> 1.00×"


@pytest.mark.parametrize(("rate", "verdict"), [(0.8, "met"), (0.799, "missed")])
def test_short_attention_is_held_to_the_measured_bandwidth(rate, verdict):
    found = verdicts(attention_report({"filbert": [1.0]}, rate * CEILING["bytes_per_s"]))
    assert found[OF_BANDWIDTH].verdict == verdict
    assert found[OF_BANDWIDTH].need == "≥ 80.0%"


def whole_models(**seconds):
    return made_report(
        *(bench_row(who.replace("_", " "), workload="bert-base-256", case_samples=(s, s))
          for who, s in seconds.items()),
        case="e2e",
    )  # fmt: skip


def test_models_are_held_to_their_factors():
    query = made_report(
        bench_row("HF eager", workload="query-bert-base", case_samples=(4.0,)),
        bench_row("filbert (captured)", workload="query-bert-base"),
        case="e2e",
    )
    compiled = bench_row("torch.compile", workload="bert-base-256", case_samples=(1.4, 1.4))
    batch = whole_models(HF_SDPA=2.0, filbert=1.0)
    batch.rows.append(compiled)
    found = verdicts(batch, query)
    kept = {what: v.verdict for what, v in found.items() if what.startswith("BERT-base")}
    assert kept == {
        "BERT-base float16, 16 texts up to 256 tokens, against HF SDPA": "met",
        "BERT-base float16, 16 texts up to 256 tokens, against torch.compile": "missed",
        CAPTURED: "met",
    }


def test_what_was_not_measured_says_which_row_and_why():
    refused = made_report(
        bench_row("HF eager", workload="query-bert-base"),
        bench_row("filbert (captured)", "unavailable", "no capture()", workload="query-bert-base"),
        case="e2e",
    )
    found = verdicts(refused, attention_report({"filbert": [1.0]}))
    assert found[CAPTURED].verdict == "not run"
    assert found[CAPTURED].reason == "query-bert-base, filbert (captured): no capture()"
    assert found[AGAINST_VARLEN].reason == "d64-max64-32k, varlen_attn: not timed"
    assert {v.verdict for v in verdicts().values()} == {"not run"}


def test_ratios_are_never_formed_between_processes():
    apart = [attention_report({who: [1.0]}) for who in ("filbert", "varlen_attn")]
    assert verdicts(*apart)[AGAINST_VARLEN].verdict == "not run"
    other_dtype = attention_report({"filbert": [1.0], "varlen_attn": [2.0]})
    for row in other_dtype.rows:
        row.dtype = "bfloat16"
    assert verdicts(other_dtype)[AGAINST_VARLEN].verdict == "not run"


def test_a_ratio_is_of_the_report_that_has_both():
    """The model is timed twice: at first without what has to be compiled."""
    first, second = whole_models(HF_SDPA=4.0, filbert=1.0), whole_models(HF_SDPA=2.0, filbert=1.0)
    second.rows.append(
        bench_row("torch.compile", workload="bert-base-256", case_samples=(1.6, 1.6))
    )
    found = verdicts(first, second)
    batch = "BERT-base float16, 16 texts up to 256 tokens, against "
    assert found[batch + "HF SDPA"].got == "4.00×"
    assert found[batch + "torch.compile"].got == "1.60×"


def test_an_aim_for_each_promise():
    assert len(aims.aims()) == 4 + 3 + 2 + 1 + 3 + 1
    assert len({aim.what for aim in aims.aims()}) == len(aims.aims())


# The report


@pytest.fixture
def findings(monkeypatch):
    stand_in(monkeypatch)
    about = environment.environment("cuda", 16)
    made = report.Findings(about)
    made.steps = [
        Step("libraries", PASSED, 5.0, ["given: 6 calls, 0 wrong"]),
        Step("tests: a", PASSED, 9.0, ["3 passed"], {"passed": 3, "failed": 0, "skipped": 1}),
        Step("tests: b", FAILED, 9.0, ["x | y in /srv/a/b.py"], {"passed": 2, "failed": 1}),
        Step("sanitizer: memcheck", NOT_RUN, 0.0, ["no time was left"]),
    ]
    made.outputs = [("tests: b", "x" * 300_000 + "the end")]
    made.add("bench: a", attention_report({"filbert": [1.0], "varlen_attn": [2.0]}, 2.7e12))
    made.digests = {"libraries": "1", "tree": "2"}
    return made


def test_the_report_holds_everything_in_three_flat_files(findings, tmp_path):
    findings.save(tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in files] == ["gpu-check.json", "gpu-check.log", "gpu-check.md"]
    data = json.loads(files[0].read_text())
    assert data["tests"] == {"passed": 5, "failed": 1, "skipped": 1}
    assert data["passed"] is False
    assert data["environment"]["gpu"]["ceilings"] == CEILING
    assert data["environment"]["gpu"]["name"] == "NVIDIA H100"
    assert data["bench"][0]["schema"] == results.SCHEMA
    assert data["bench"][0]["rows"][0]["samples_s"] == [1.0]
    table = files[2].read_text()
    for text in (
        "NVIDIA H100", "5 passed, 1 failed, 1 skipped", "✗ failed", "– not run", "x \\| y in b.py",
        "132 multiprocessors", "3000 GB/s copied", "## Aims", "2.00× | met", "90.0% | met",
        "### d64-max64-32k, float16", "Something failed",
    ):  # fmt: skip
        assert text in table, text
    log = files[1].read_text()
    assert log.rstrip().endswith("the end")
    assert len(log) < 250_000


def test_only_failures_fail_it(findings):
    assert not findings.passed
    findings.steps = [step for step in findings.steps if step.status != FAILED]
    assert findings.passed  # something was not run, and every aim but two was not either
    findings.steps = [step for step in findings.steps if step.status == NOT_RUN]
    assert not findings.passed


# What an earlier call finished


@pytest.fixture
def begun(findings, tmp_path):
    """A report of an earlier call on disk, and the findings of a later one that know where they
    are."""
    findings.steps += [
        Step("tests: c", FAILED, 150.0, ["stopped after 150 s"], {"cut": True}),
        Step("bench: a", PASSED, 20.0, ["2 of 2 rows"]),
    ]
    findings.save(tmp_path)
    later = report.Findings(findings.environment)
    later.steps = [Step("libraries", PASSED, 1.0)]
    later.digests = dict(findings.digests)
    return later, earlier.load(tmp_path)


def kept(later):
    return [step.name for step in later.steps if step.data.get("kept")]


def test_what_an_earlier_call_finished_is_kept(begun, tmp_path):
    later, before = begun
    assert later.keep(before) == "3 steps of an earlier call are kept"
    assert kept(later) == ["tests: a", "tests: b", "bench: a"]
    assert later.has("tests: b")
    assert not later.has("tests: c")  # it was cut short
    assert not later.has("sanitizer: memcheck")  # it never ran
    assert later.measured["bench: a"].rows[0].samples_s == [1.0]
    later.save(tmp_path)
    assert "the end" in (tmp_path / "gpu-check.log").read_text()
    assert "✓ passed, earlier" in (tmp_path / "gpu-check.md").read_text()
    data = json.loads((tmp_path / "gpu-check.json").read_text())
    assert data["tests"] == {"passed": 5, "failed": 1, "skipped": 1}


def test_a_failure_is_looked_at_again_once_the_tree_changed(begun):
    later, before = begun
    later.digests["tree"] = "3"
    later.keep(before)
    assert kept(later) == ["tests: a", "bench: a"]


@pytest.mark.parametrize("what", ["GPU", "libraries", "report"])
def test_what_is_about_something_else_is_not_kept(begun, what):
    later, before = begun
    if what == "GPU":
        later.environment = later.environment | {"gpu": {"name": "another card"}}
    elif what == "libraries":
        later.digests["libraries"] = "4"
    else:
        before = earlier.load(Path("nowhere"))
    said = later.keep(before)
    assert said.startswith("nothing to resume")
    assert what in said
    assert kept(later) == []


def test_digests_tell_libraries_and_tree_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(earlier, "ROOT", tmp_path)
    source, library = tmp_path / "tests" / "test_x.py", tmp_path / "libfilbert_ops.so"
    source.parent.mkdir()
    source.write_text("a")
    library.write_text("b")
    first = earlier.digests(tmp_path)
    source.write_text("c")
    second = earlier.digests(tmp_path)
    library.write_text("d")
    third = earlier.digests(tmp_path)
    assert first["tree"] != second["tree"] == third["tree"]
    assert first["libraries"] == second["libraries"] != third["libraries"]
