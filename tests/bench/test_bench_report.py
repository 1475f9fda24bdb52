"""What the bench leaves behind: files, tables, comparisons, pictures, and its command line."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
from bench.cases import CASES, e2e
from bench.report.compare import compare, verdict
from bench.report.plot import plot
from bench.report.table import figure, markdown, seconds
from bench.results import Report, Row
from bench.runner import matching
from bench.timing import Timing

from bench import cli, environment, results


def timed_row(name, samples, workload="w", reference="base", **more):
    row = Row(workload, "float32", name, reference, "ok", error=1e-7, tolerance=1e-4, **more)
    own = Timing(tuple(samples), tuple(range(len(samples))), 1)
    row.add_timing(own, Timing((4.0, 4.0, 8.0), (0, 1, 2), 1))
    row.figures["tokens_per_s"] = 100 / row.figures["median_s"]
    return row


def report_of(*rows, case="e2e"):
    return Report(case, environment.environment("cpu", 2), {"repeats": 3}, list(rows))


def test_json_round_trip_keeps_every_sample(tmp_path):
    failed = results.unavailable("w", "float32", "absent", "base", "no /usr/lib/private/libx.so")
    report = report_of(timed_row("a", [1.0, 2.0, 4.0]), failed)
    path = tmp_path / "deep" / "run.json"
    report.save(path)
    again = results.load(path)
    assert again == report
    data = json.loads(path.read_text())
    assert data["schema"] == results.SCHEMA
    assert data["rows"][0]["samples_s"] == [1.0, 2.0, 4.0]
    assert data["rows"][1]["reason"] == "no libx.so"
    assert {"cpu", "threads", "versions", "commit", "dirty", "date", "os"} <= set(
        data["environment"]
    )
    assert {"model", "flags", "cores"} <= set(data["environment"]["cpu"])
    assert data["environment"]["versions"]["torch"] == torch.__version__


def test_json_holds_no_host_name_and_no_folder(tmp_path):
    path = tmp_path / "run.json"
    report_of(timed_row("a", [1.0])).save(path)
    text = path.read_text()
    for private in (str(environment.ROOT), str(Path.home()) + "/", platform.node()):
        assert private not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ('{"schema": "other/9"}', "other/9"), ("[]", "list")],
)
def test_load_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        results.load(path)


def test_compare_tells_faster_from_noise():
    before = report_of(timed_row("a", [1.0, 1.1, 1.2]), timed_row("b", [1.0, 1.1, 1.2]))
    after = report_of(
        timed_row("a", [0.5, 0.5, 0.6]), timed_row("b", [1.1, 1.15, 1.3]), timed_row("new", [1.0])
    )
    lines = compare(before, after).splitlines()
    assert "faster" in next(line for line in lines if "/a |" in line)
    assert "within noise" in next(line for line in lines if "/b |" in line)
    assert "only in b: w/float32/new" in lines
    assert verdict(after.rows[0], before.rows[0]) == "slower"


def test_compare_warns_about_another_machine_and_refuses_another_case():
    a, b = report_of(timed_row("a", [1.0])), report_of(timed_row("a", [1.0]))
    b.environment["cpu"] = b.environment["cpu"] | {"model": "another one"}
    assert "another one" in compare(a, b)
    assert "Compare ratios" not in compare(a, a)
    with pytest.raises(ValueError, match="different cases"):
        compare(a, report_of(timed_row("a", [1.0]), case="memory"))


def test_table_shows_reasons_and_no_number_for_what_was_not_checked():
    wrong = Row("w", "float32", "bad", "base", "wrong", "wrong result: error 3", error=3.0)
    text = markdown(report_of(timed_row("a", [1.0, 2.0, 3.0]), wrong), e2e.RATE)
    bad = next(line for line in text.splitlines() if line.startswith("| bad"))
    assert bad.count("–") == 5
    assert "✗ wrong result: error 3" in bad
    good = next(line for line in text.splitlines() if line.startswith("| a "))
    assert "2.00 s" in good
    assert "2.67 (2.33 – 3.33)" in good
    assert "2 threads" in text


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 µs"), (1.0, "1.00 s")]
)
def test_seconds_choose_their_unit(value, text):
    assert seconds(value) == text


def test_figures_have_three_digits():
    shown = [figure(value) for value in (0, 0.123, 9.87, 98.7, 987.6)]
    assert shown == ["0", "0.12", "9.87", "98.7", "988"]


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("case", ["e2e", "attn_varlen", "memory"])
def test_plot_writes_a_picture(tmp_path, suffix, case):
    pytest.importorskip("matplotlib", reason="plots are optional")
    failed = results.unavailable("w", "float32", "absent", "base", "not installed")
    if case == "attn_varlen":
        rows = [timed_row("a", [1.0, 2.0], f"w{x}") for x in (16, 32)]
        for x, row in zip((16, 32), rows, strict=True):
            row.axis = {"panel": "p", "x": x, "x_label": "tokens"}
            row.figures["flop_per_s"] = 1e9
    elif case == "memory":
        rows = [Row("w", "float32", "a", "base", "ok", figures={"peak_over_bytes": 1e8}), failed]
    else:
        rows = [timed_row("a", [1.0, 2.0]), timed_row("filbert", [0.5, 0.6]), failed]
    output = tmp_path / f"plot{suffix}"
    plot(report_of(*rows, case=case), CASES[case].RATE, output)
    content = output.read_bytes()
    assert len(content) > 2000
    if suffix == ".svg":
        assert b"threads" in content  # the caption is text and names the machine
        again = tmp_path / "again.svg"
        plot(report_of(*rows, case=case), CASES[case].RATE, again)
        assert again.read_bytes() == content


@pytest.mark.filterwarnings("error::UserWarning")
def test_plot_makes_room_for_whiskers_far_beyond_every_median(tmp_path):
    pytest.importorskip("matplotlib", reason="plots are optional")
    noisy = timed_row("a", [0.1, 0.1, 50.0, 60.0, 0.1])
    plot(report_of(noisy, timed_row("b", [0.1])), e2e.RATE, tmp_path / "plot.png")


def test_plot_refuses_an_unknown_suffix_and_an_empty_report(tmp_path):
    with pytest.raises(ValueError, match=r"\.svg"):
        plot(report_of(timed_row("a", [1.0])), e2e.RATE, tmp_path / "plot.bmp")
    with pytest.raises(ValueError, match="no rows"):
        plot(report_of(), e2e.RATE, tmp_path / "plot.svg")


def test_matching_follows_globs_and_refuses_what_matches_nothing():
    names = ["HF eager", "HF SDPA", "OpenVINO"]
    assert matching(names, ["hf*"], "--baseline") == ["HF eager", "HF SDPA"]
    with pytest.raises(ValueError, match="OpenVINO"):
        matching(names, ["nothing*"], "--baseline")


def test_command_line_end_to_end(tmp_path, capsys):
    """A two-layer model: checked, timed, written, tabulated, compared."""
    path = tmp_path / "tiny.json"
    command = ["run", "e2e", "--workload", "tiny", "--dtype", "float32", "--baseline", "HF*,proto*"]
    status = cli.main([*command, "--repeats", "3", "--budget-s", "0.5", "--json", str(path)])
    printed = capsys.readouterr().out
    assert status == 0
    report = results.load(path)
    rows = {row.contestant: row for row in report.rows}
    assert {"HF eager", "HF SDPA", "prototype", "filbert"} <= set(rows)
    for name in ("HF eager", "HF SDPA", "prototype"):
        assert rows[name].status == "ok", rows[name].reason
        assert rows[name].error < e2e.TOLERANCE["float32"]
        assert rows[name].figures["q1_s"] <= rows[name].figures["median_s"]
        assert name in printed
    assert cli.main(["table", str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main(["compare", str(path), str(path)]) == 0
    assert "within noise" in capsys.readouterr().out


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    assert cli.main(["run", "e2e", "--workload", "nonsense"]) == 2
    assert "bert-base-256" in capsys.readouterr().err
    assert cli.main(["table", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["run", "attn_varlen", "--device", "cuda"]) == 2
        assert "--device" in capsys.readouterr().err


def test_list_names_every_case(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CASES)
    assert "bert-base-512-b8" in printed
