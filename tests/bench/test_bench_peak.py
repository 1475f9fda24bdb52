"""Shares of the processor's peak: what is measured, and what is made of it."""

from __future__ import annotations

import time

import pytest
import torch
from bench.cases import CASES
from bench.cases import peak as case
from bench.peak import COPY, KINDS, Work, Yardstick, add_figures, kind_of, measure, yardsticks
from bench.results import Row
from bench.runner import Options
from bench.timing import Timing, Unavailable

from bench import cli, peak
from filbert import _load


def timed(name, samples):
    row = Row("w", "float32", name, "a", "ok")
    row.add_timing(Timing(tuple(samples), tuple(range(len(samples))), 1), None)
    return row


def test_a_share_is_of_what_bounds_the_work_and_of_the_same_rounds():
    fma = Yardstick("fma", 100.0, lambda: None)
    copy = Yardstick(COPY, 1000.0, lambda: None)
    # The processor halves its speed in the second round, for both sides.
    rows = [timed("a", [4.0, 8.0]), timed(fma.name, [1.0, 2.0]), timed(copy.name, [1.0, 2.0])]
    add_figures(rows, {"a": Work({"fma": 200.0}, 500)}, [fma, copy], "flop_per_s")
    assert rows[0].figures["share_of_peak"] == pytest.approx(200 / 100 / 4)
    assert rows[1].figures["flop_per_s"] == pytest.approx(100 / 1.5)
    assert "share_of_peak" not in rows[1].figures
    add_figures(rows, {"a": Work({"fma": 2.0}, 2000)}, [fma, copy], "flop_per_s")
    assert rows[0].figures["share_of_peak"] == pytest.approx(2000 / 1000 / 4)


def test_there_is_no_share_where_a_bound_was_not_measured():
    fma = Yardstick("fma", 100.0, lambda: None)
    rows = [timed("a", [4.0]), timed(fma.name, [1.0])]
    add_figures(rows, {"a": Work({"fma": 200.0}, 500)}, [fma], "flop_per_s")
    assert "share_of_peak" not in rows[0].figures


@pytest.mark.parametrize("kind", KINDS)
def test_every_peak_runs_for_its_time_and_grows_with_what_it_does(kind):
    for one in yardsticks([kind], 1):
        start = time.perf_counter()
        one.run()
        assert time.perf_counter() - start > peak.RUN_S / 8
        assert one.amount > 1e6
        assert measure(kind, 1) > 1e8


def test_no_product_is_faster_than_the_peak():
    """The loop of FMA is what it says: PyTorch's GEMM stays below it."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    torch.mm(a, b)
    width = "avx512" if _load.isa().startswith("avx512") else _load.isa()
    if width not in ("avx2", "avx512"):
        pytest.skip("PyTorch uses wider vectors than the base instruction set")

    def below():  # the processor may slow down in between
        best = min(_seconds(lambda: torch.mm(a, b)) for _ in range(5))
        return 2 * 512**3 / best < 1.1 * measure("fma", torch.get_num_threads())

    assert any(below() for _ in range(6))


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_without_the_library_of_loops_the_reason_is_said(monkeypatch):
    def missing():
        raise Unavailable("built without FILBERT_BENCH")

    monkeypatch.setattr(peak, "_loop", missing)
    assert [one.kind for one in yardsticks(KINDS, 1)] == [COPY]
    rows = case.run(Options(threads=1))
    assert {row.reason for row in rows if row.workload != COPY} == {"built without FILBERT_BENCH"}
    assert all(row.figures["per_s"] > 1e8 for row in rows if row.workload == COPY)


def test_float32_products_are_made_of_fma():
    assert kind_of(torch.float32) == "fma"


def test_all_runs_every_case_and_writes_a_file_for_each(monkeypatch, tmp_path, capsys):
    ran = []

    def run(options, name):
        ran.append(name)
        return [Row("w", "float32", "a", "a", "ok", figures={})]

    for name, module in CASES.items():
        monkeypatch.setattr(module, "run", lambda options, name=name: run(options, name))
    assert cli.main(["run", "all", "--json", str(tmp_path)]) == 0
    assert ran == list(CASES)
    assert {path.stem for path in tmp_path.glob("*.json")} == set(CASES)
    assert all(f"## {name}" in capsys.readouterr().out for name in list(CASES)[:1])
