"""The bench on a GPU, as far as it can be tested without one: clocks, ceilings, environment."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from bench.cases import attn_varlen, bias_gelu, e2e
from bench.gpu_check import rehearsal
from bench.report.compare import compare
from bench.results import Report
from bench.runner import Options
from bench.timing import Contestant, WallClock

from bench import cli, environment, gpu, gpu_timing, runner, timing
from stand_in_gpu import CEILING, H100, stand_in


class FakeEvent:
    """Stands for ``torch.cuda.Event`` on a device where a run takes as long as it is told to."""

    now_ms = 0.0
    log: list[str]

    def __init__(self, log):
        self.log = log

    def record(self):
        self.log.append("record")
        self.at = FakeEvent.now_ms

    def elapsed_time(self, other):
        return other.at - self.at


def fake_clock(log):
    def flush():
        log.append("flush")
        FakeEvent.now_ms += 100.0  # must not be counted

    return gpu_timing.EventClock(flush, lambda: FakeEvent(log), lambda: log.append("wait"))


def takes(milliseconds, log, name="run"):
    def run():
        log.append(name)
        FakeEvent.now_ms += milliseconds
        return torch.ones(1)

    return run


# Clocks


def test_events_stand_around_the_run_alone_and_caches_are_cold_before_each():
    log = []
    value, seconds = fake_clock(log).time(
        takes(3.0, log), repeats=2, before=lambda: log.append("before")
    )
    assert log == [*["before", "flush", "record", "run", "record"] * 2, "wait"]
    assert seconds == pytest.approx(3e-3)
    assert torch.equal(value, torch.ones(1))


def test_the_event_clock_frees_a_result_before_the_next_run():
    alive, most = [0], [0]

    class Result:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    fake_clock([]).time(Result, repeats=5)
    assert most == [1]
    WallClock(lambda: None).time(Result, repeats=5)
    assert most == [1]


def test_the_event_clock_wakes_the_device_before_a_race(monkeypatch):
    monkeypatch.setattr(gpu_timing, "WARM_UP_S", 0.01)
    log = []
    fake_clock(log).prepare()
    assert log[:2] == ["flush", "wait"]
    assert "record" not in log


def test_a_race_by_events_reports_what_they_say(monkeypatch):
    monkeypatch.setattr(gpu_timing, "WARM_UP_S", 0.0)
    log = []
    racers = [
        Contestant(name, takes(ms, log, name), lambda value: value, estimate_s=ms / 1e3)
        for name, ms in (("slow", 2.0), ("fast", 0.5))
    ]
    found = timing.race(racers, repeats=4, budget_s=5.0, min_sample_s=2e-3, clock=fake_clock(log))
    assert found["slow"].median_s == pytest.approx(2e-3)
    assert found["fast"].median_s == pytest.approx(0.5e-3)
    assert (found["slow"].inner, found["fast"].inner) == (1, 4)
    assert timing.ratios(found["slow"], found["fast"]) == pytest.approx([4.0] * 4)


def test_a_budget_pays_for_what_the_clock_does_around_a_run():
    """Both runs take a microsecond; around one of them the clock is busy for longer."""

    class BusyClock(WallClock):
        def time(self, run, repeats=1, before=None):
            time.sleep(run())
            return None, 1e-6

    racers = [
        Contestant(name, lambda busy=busy: busy, lambda value: value, estimate_s=1e-6)
        for name, busy in (("cheap", 0.001), ("dear", 0.03))
    ]
    start = time.perf_counter()
    found = timing.race(racers, repeats=64, budget_s=0.3, clock=BusyClock())
    assert time.perf_counter() - start < 3.0
    assert 1 <= len(found["dear"].rounds) < len(found["cheap"].rounds)
    assert set(found["dear"].rounds) <= set(found["cheap"].rounds)
    assert found["dear"].median_s == 1e-6


def test_the_wall_clock_waits_for_the_device_after_every_run():
    log = []
    clock = WallClock(lambda: log.append("wait"))
    clock.time(lambda: log.append("run"), repeats=2, before=lambda: log.append("before"))
    assert log == ["before", "wait", "run", "wait"] * 2


@pytest.mark.parametrize("wait", [None, lambda: None], ids=["cpu", "device"])
def test_what_comes_before_a_run_is_not_timed(wait):
    seconds = WallClock(wait).time(lambda: None, 3, before=lambda: time.sleep(0.02))[1]
    assert seconds < 0.01
    assert WallClock(wait).time(lambda: time.sleep(0.02), 2)[1] >= 0.02


@pytest.mark.parametrize("cache", [1 << 20, 3 << 20])
def test_a_flush_writes_and_reads_twice_the_cache(monkeypatch, cache):
    monkeypatch.setattr(gpu_timing, "LEAST_FLUSH", 3 << 20)
    about = SimpleNamespace(L2_cache_size=cache)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: about)
    flush = gpu_timing.ColdCache("cpu")
    for buffer in (flush._written, flush._read):
        assert buffer.numel() * 4 == max(3 << 20, 2 * cache)
    flush._written.fill_(7.0)
    flush._read.fill_(0.5)
    flush()
    assert (flush._written == 1.0).all()
    assert flush._sum == flush._read.numel() / 2


def test_each_device_has_its_clock(monkeypatch):
    made = []
    monkeypatch.setattr(gpu_timing.EventClock, "of", lambda device: made.append(device) or "events")
    assert runner.kernel_clock(Options(device="cuda:1")) == "events"
    assert made == ["cuda:1"]
    assert isinstance(runner.kernel_clock(Options(device="cpu")), WallClock)
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    runner.caller_clock(Options(device="cuda")).time(lambda: None)
    assert log == ["wait", "wait"]
    runner.caller_clock(Options(device="cpu")).time(lambda: None)
    assert log == ["wait", "wait"]


# The command line


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    """torch.cuda.set_device refuses it, which the stand-in does too."""
    chosen = []
    with rehearsal.no_gpu_needed():
        with pytest.raises(ValueError, match="cuda"):
            torch.cuda.set_device("cuda")
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        for name in ("cpu", "cuda", "cuda:0"):
            cli._use(name)
        assert chosen == [0]
        with pytest.raises(
            ValueError, match="got 'cuda:1', need one of 1 CUDA devices; try cuda:0"
        ):
            cli._use("cuda:1")
        for name in ("gpu", "cuda:x", "meta"):
            with pytest.raises(ValueError, match=f"got '{name}', need cpu, cuda or cuda:N"):
                cli._use(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="a CUDA device that torch can see; try cpu"):
        cli._use("cuda")


# The GPU and its ceilings


def test_ceilings_count_bytes_both_ways_and_two_operations_per_multiply_add(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu, "SIDE", 64)
    ran = []

    def half_a_second(run, runs):
        ran.append(run())
        return 0.5

    monkeypatch.setattr(gpu, "_median_s", half_a_second)
    gpu._measured.cache_clear()
    found = gpu.ceilings("cpu")
    assert found == {"bytes_per_s": 2 * (1 << 16) / 0.5, "flop_per_s": 2 * 64**3 / 0.5}
    assert all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in ran)
    found["bytes_per_s"] = 0.0
    assert gpu.ceilings("cpu")["bytes_per_s"] > 0  # once per process, and nobody can spoil it
    assert len(ran) == 2
    gpu._measured.cache_clear()


def test_the_floor_is_the_longer_of_the_two():
    assert gpu.floor_s(7e14, 3e11, CEILING) == 1.0
    assert gpu.floor_s(7e13, 6e12, CEILING) == 2.0


@pytest.mark.parametrize(
    ("script", "version"),
    [("echo 580.159.04; echo 580.159.04", "580.159.04"), ("exit 9", "unknown"), ("", "unknown")],
)
def test_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path, script, version):
    if script:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.driver() == version


def test_the_environment_of_a_gpu_names_it_and_filberts_library(monkeypatch):
    from filbert import _load

    stand_in(monkeypatch)
    about = environment.environment("cuda", 4)
    assert about["gpu"] == {
        "name": "NVIDIA H100", "driver": "580.1", "cuda": torch.version.cuda,
        "compute_capability": "9.0", "multiprocessors": 132, "l2_bytes": 50 << 20,
        "memory_bytes": 80 << 30,
    }  # fmt: skip
    assert environment.caption(about).startswith("NVIDIA H100 (driver 580.1), 4 threads")
    json.dumps(about, allow_nan=False)
    monkeypatch.setitem(_load.missing, "cuda", "no /usr/lib/private/libcuda.so")
    assert environment.environment("cuda", 4)["filbert"]["cuda"] == {
        "loaded": False, "reason": "no libcuda.so"
    }  # fmt: skip
    monkeypatch.delitem(_load.missing, "cuda")
    told = SimpleNamespace(cuda_architectures=lambda: "sm 90, CUDA 13.0")
    monkeypatch.setattr(torch.ops, "filbert", told)
    assert environment.environment("cuda", 4)["filbert"]["cuda"] == {
        "loaded": True, "built_for": "sm 90, CUDA 13.0"
    }  # fmt: skip


def test_a_copy_without_git_takes_its_commit_from_the_environment(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", no_git)
    monkeypatch.setenv("FILBERT_COMMIT", " 0123abc ")
    assert environment.commit() == {"commit": "0123abc", "dirty": None}
    monkeypatch.delenv("FILBERT_COMMIT")
    assert environment.commit() == {"commit": "unknown", "dirty": None}


def test_compare_warns_about_another_gpu(monkeypatch):
    stand_in(monkeypatch)
    a, b = (Report("e2e", environment.environment("cuda", 2), {}, []) for _ in range(2))
    b.environment["gpu"] = b.environment["gpu"] | {"name": "another card"}
    assert "another card" in compare(a, b)
    assert "Compare ratios" not in compare(a, a)


# Dtypes


def test_float16_is_for_gpus_and_no_run_on_the_cpu_trips_over_it(capsys):
    assert runner.default_dtypes("cuda") == ("float16", "bfloat16")
    assert "float16" not in runner.default_dtypes("cpu")
    assert cli._dtypes(None, "cpu") == ("float32", "bfloat16")
    assert cli._dtypes(("*",), "cpu") == ("float32", "bfloat16")
    assert cli._dtypes(("*16",), "cuda:0") == ("bfloat16", "float16")
    assert cli.main(["run", "attn_varlen", "--dtype", "float16"]) == 2
    assert "CUDA only" in capsys.readouterr().err


@pytest.mark.parametrize("case", [attn_varlen, bias_gelu, e2e], ids=lambda case: case.NAME)
def test_float16_is_held_to_more_digits_than_bfloat16(case):
    assert case.TOLERANCE["float32"] < case.TOLERANCE["float16"] < case.TOLERANCE["bfloat16"]
    assert case.TOLERANCE["bfloat16"] / case.TOLERANCE["float16"] >= 4
