"""The bench measures honestly: it checks before it times, and its arithmetic is right."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from bench.cases import attn_varlen, e2e, e2e_binary, footprint, memory, norm_residual
from bench.results import Row
from bench.runner import DTYPES, Options, check_then_time
from bench.timing import Contestant, Timing, Unavailable

from bench import baselines, check, engines, ours, timing, workloads


def contestant(name, value, seconds_=0.0):
    """A contestant that answers ``value`` after ``seconds_``."""

    def run():
        time.sleep(seconds_)
        return torch.tensor(value)

    return Contestant(name, run, lambda found: found)


def tiny_setup(dtype=torch.float32):
    return engines.Setup(workloads.model("tiny"), workloads.WORKLOADS["tiny"](), dtype, "cpu", 1)


# Statistics


def test_quartiles_interpolate_and_accept_one_sample():
    assert timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0)


def test_ratios_pair_samples_of_the_same_round_only():
    slow_machine_in_round_2 = Timing((4.0, 40.0), (0, 2), 1)
    own = Timing((1.0, 9.0, 10.0), (0, 1, 2), 1)
    assert timing.ratios(slow_machine_in_round_2, own) == [4.0, 4.0]


def test_a_ratio_of_rounds_survives_weather_that_the_ratio_of_medians_does_not():
    reference = Timing((2.0, 20.0, 20.0), (0, 1, 2), 1)
    own = Timing((1.0, 10.0), (0, 1), 1)
    row = Row("w", "float32", "own", "ref", "ok")
    row.add_timing(own, reference)
    assert row.figures["ratio"] == 2.0
    assert row.figures["ratio_of_medians"] == pytest.approx(20 / 5.5)


def test_periods_are_nested_powers_of_two_that_fit_the_budget():
    costs = [0.1, 1.0, 30.0]
    found = timing.periods(costs, budget_s=30.0, repeats=16)
    assert found[0] == 1
    assert all(period & (period - 1) == 0 for period in found)
    assert found == sorted(found)
    spent = sum(cost * len(range(0, 16, every)) for cost, every in zip(costs, found, strict=True))
    assert spent <= 2.5 * 30.0  # periods round towards more rounds, at most twice as many


@pytest.mark.parametrize("budget", [1e-6, 1.0, 1e6])
def test_periods_never_exceed_the_rounds(budget):
    found = timing.periods([0.001, 5.0], budget, repeats=10)
    assert all(1 <= period <= 10 for period in found)


def test_race_interleaves_and_rotates():
    log = []
    racers = [
        Contestant(name, lambda name=name: log.append(name), lambda value: value, estimate_s=1e-4)
        for name in "abc"
    ]
    found = timing.race(racers, repeats=4, budget_s=5.0)
    rounds = ["".join(log[-12:][i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert all(t.rounds == (0, 1, 2, 3) and len(t.samples_s) == 4 for t in found.values())


def test_race_repeats_short_runs_inside_a_sample_and_reports_seconds_per_run():
    racer = contestant("short", [1.0], 0.002)
    racer.estimate_s = 0.002
    found = timing.race([racer], repeats=3, budget_s=2.0, min_sample_s=0.02)["short"]
    assert found.inner >= 3
    assert 0.002 <= found.median_s < 0.02


def test_race_gives_a_slow_contestant_fewer_rounds_but_shared_ones():
    racers = [contestant("fast", [1.0], 0.001), contestant("slow", [1.0], 0.05)]
    racers[0].estimate_s, racers[1].estimate_s = 0.001, 0.05
    found = timing.race(racers, repeats=32, budget_s=0.3)
    assert 1 <= len(found["slow"].rounds) < len(found["fast"].rounds)
    assert set(found["slow"].rounds) <= set(found["fast"].rounds)


def test_race_settles_before_it_starts():
    settled = []
    racer = contestant("a", [1.0])
    timing.race([racer], repeats=2, budget_s=1.0, settle=lambda: settled.append(len(settled)))
    assert settled


# The check


def test_row_error_is_that_of_the_worst_row():
    reference = torch.ones(1000, 8)
    wrong = reference.clone()
    wrong[17] = 2.0
    assert check.row_error(wrong, reference) == pytest.approx(1.0)
    assert check.row_error(reference, reference) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_fails(bad):
    reference = torch.ones(3, 4)
    got = reference.clone()
    got[1, 2] = bad
    outcome = check.check(got, reference, 1e9)
    assert not outcome.passed
    assert "not finite" in outcome.reason


def test_a_wrong_shape_fails_and_says_both():
    outcome = check.check(torch.ones(2, 3), torch.ones(3, 3), 1.0)
    assert not outcome.passed
    assert "(2, 3)" in outcome.reason
    assert "(3, 3)" in outcome.reason


def test_a_wrong_contestant_is_shown_and_not_timed():
    ran = []

    def wrong():
        racer = contestant("wrong", [[1.0, 2.5]])
        inner = racer.run
        racer.run = lambda: ran.append(1) or inner()
        return racer

    def broken():
        raise RuntimeError("no such kernel")

    def absent():
        raise Unavailable("not installed")

    rows = {
        row.contestant: row
        for row in check_then_time(
            {"base": lambda: contestant("base", [[1.0, 2.0]]), "wrong": wrong, "broken": broken,
             "absent": absent},
            torch.tensor([[1.0, 2.0]]),
            workload="w", dtype="float32", reference="base", tolerance=1e-3, options=Options(),
            repeats=3, budget_s=0.2, min_sample_s=0.0, pause_s=0.0, clock=timing.WallClock(),
        )
    }  # fmt: skip
    assert rows["base"].status == "ok"
    assert "median_s" in rows["base"].figures
    assert rows["wrong"].status == "wrong"
    assert "tolerance" in rows["wrong"].reason
    assert len(ran) == 1  # the check's run, none for timing
    assert rows["broken"].reason == "RuntimeError: no such kernel"
    assert rows["absent"].reason == "not installed"
    assert not any(rows[name].samples_s for name in ("wrong", "broken", "absent"))


# Real contestants on a small model


@pytest.mark.parametrize(
    "builder",
    [baselines.hf_eager, baselines.hf_sdpa, baselines.sdpa_buckets, baselines.prototype],
    ids=lambda builder: builder.__name__,
)
@pytest.mark.parametrize("pooled", [False, True])
def test_baselines_agree_with_each_sequence_alone(builder, pooled):
    setup = tiny_setup()
    setup = replace(setup, workload=replace(setup.workload, pooled=pooled))
    racer = engines.contestant("x", builder(setup), setup)
    outcome = check.check(
        racer.result(racer.run()), engines.reference_answer(setup), e2e.TOLERANCE["float32"]
    )
    assert outcome.passed, outcome


def _without_mask(setup):
    model = baselines.hugging_face(setup, "sdpa")
    return lambda ids, mask: model(input_ids=ids).last_hidden_state


def _without_one_bias(setup):
    model = baselines.hugging_face(setup, "sdpa")
    layer = model.encoder.layer[1].attention.output.dense
    layer.bias = torch.nn.Parameter(torch.zeros_like(layer.bias))
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state


def _shifted_by_one_sequence(setup):
    model = baselines.hugging_face(setup, "sdpa")
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state.roll(1, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mistake", [_without_mask, _without_one_bias, _shifted_by_one_sequence])
def test_the_check_catches_the_mistakes_a_kernel_makes(mistake, dtype):
    setup = tiny_setup(DTYPES[dtype])
    racer = engines.contestant("x", engines.Engine(mistake(setup)), setup)
    outcome = check.check(
        racer.result(racer.run()), engines.reference_answer(setup), e2e.TOLERANCE[dtype]
    )
    assert not outcome.passed


def test_a_bfloat16_contestant_leaves_the_shared_model_alone():
    setup = tiny_setup(torch.bfloat16)
    before = {name: p.clone() for name, p in setup.model.named_parameters()}
    baselines.hf_sdpa(setup)
    for name, parameter in setup.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


def test_float32_contestants_share_the_weights_of_the_model():
    setup = tiny_setup()
    copy = baselines.hugging_face(setup, "eager")
    for mine, theirs in zip(copy.parameters(), setup.model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    assert copy.config is not setup.model.config


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_exported_runtimes_agree_where_installed(package):
    pytest.importorskip(package, reason=f"{package} is an optional baseline")
    name = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[package]
    options = Options(workloads=("tiny",), baselines=(name,), dtypes=("float32",), repeats=1,
                      budget_s=0.1)  # fmt: skip
    row = next(row for row in e2e.run(options) if row.contestant == name)
    assert row.status == "ok", row.reason


def test_filbert_on_its_reference_code_is_refused(monkeypatch):
    from filbert import _load

    monkeypatch.setattr(_load, "C", None)
    monkeypatch.setitem(_load.missing, "ops", "no compiler was found")
    with pytest.raises(Unavailable, match="no compiler was found"):
        ours.filbert(tiny_setup())
    mix = attn_varlen.WORKLOADS["d32-max16"]
    with pytest.raises(Unavailable, match="reference code"):
        attn_varlen.ours(mix, attn_varlen.inputs(mix, torch.float32, "cpu"))


def test_time_limit_interrupts_and_restores_the_handler():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Unavailable, match="given up"), baselines.time_limit(0.05, "waiting"):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before


# Workloads


@pytest.mark.parametrize("maximum", [16, 64, 256, 512])
@pytest.mark.parametrize("batch", [8, 16])
def test_lengths_are_uniform_with_mean_six_tenths_of_the_maximum(maximum, batch):
    lengths = workloads.uniform_lengths(batch, maximum)
    assert len(lengths) == batch
    assert max(lengths) == maximum
    assert min(lengths) == round(0.2 * maximum)
    assert sum(lengths) / batch == pytest.approx(0.6 * maximum, rel=0.03)
    assert lengths != sorted(lengths)


def test_batches_cover_every_sequence_once_sorted_or_not():
    work = workloads.WORKLOADS["tiny"]()
    for batches in (work.batches(), work.sorted_batches()):
        assert sorted(n for batch in batches for n in batch.order) == list(range(4))
        for batch in batches:
            for row, (number, length) in enumerate(zip(batch.order, batch.lengths, strict=True)):
                assert torch.equal(batch.input_ids[row, :length], work.sequences[number])
                assert batch.attention_mask[row].sum() == length


def test_sorted_batches_pad_less():
    work = workloads.WORKLOADS["bert-base-64"]()
    padded, sorted_ = (
        sum(batch.input_ids.numel() for batch in found)
        for found in (work.batches(), work.sorted_batches())
    )
    assert work.tokens < sorted_ < padded


@pytest.mark.parametrize("name", ["d64-max32", "d32-all16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_baselines_pass_their_check(name, dtype):
    mix = attn_varlen.WORKLOADS[name]
    qkv = attn_varlen.inputs(mix, DTYPES[dtype], "cpu")
    right = attn_varlen.right_answer(mix, qkv)
    for build in (attn_varlen.padded, attn_varlen.per_sequence):
        racer = build(mix, qkv)
        outcome = check.check(racer.result(racer.run()), right, attn_varlen.TOLERANCE[dtype])
        assert outcome.passed, (racer.name, outcome)


def test_attention_counts_the_work_of_real_tokens():
    mix = attn_varlen.Mix(dim=8, maximum=3, mixed=False)
    # Two products of 3x3x8 multiply-adds for each of 12 heads and 16 sequences.
    assert mix.flop == 2 * 2 * 3 * 3 * 8 * 12 * 16


def test_binary_contestants_say_which_model_they_are():
    """Rows of two results are paired by name: one such name was once that of another model."""
    for name in e2e_binary.BINARY:
        assert name.endswith((", published", ", two-valued"))


def test_norm_residual_runs_and_counts_three_streams(monkeypatch):
    size = norm_residual.Size(rows=5, width=8)
    monkeypatch.setattr(norm_residual, "WORKLOADS", {"5x8": size})
    assert size.moved(torch.bfloat16) == 3 * 5 * 8 * 2
    rows = norm_residual.run(Options(repeats=2, budget_s=0.1))
    by_key = {(row.contestant, row.dtype): row for row in rows}
    for dtype in ("float32", "bfloat16"):
        eager = by_key["F.layer_norm", dtype]
        assert eager.status == "ok", eager.reason
        copy = by_key["copy_", dtype]
        assert copy.figures["share_of_copy"] == pytest.approx(1.0)


def test_peak_over_sees_what_a_run_allocates():
    if not memory.STATUS.exists():
        pytest.skip("resident memory is read from /proc, which this system does not have")
    size = 64 << 20
    value, rise, _ = memory.peak_over(lambda: bytearray(size).__len__())
    assert value == size
    assert 0.9 * size < rise < 1.5 * size
    _, little, _ = memory.peak_over(lambda: None)
    assert little < 0.25 * size


def test_memory_case_measures_in_a_fresh_process():
    options = Options(
        workloads=("tiny",), baselines=("HF SDPA",), dtypes=("float32",), only="*/HF SDPA"
    )
    (row,) = memory.run(options)
    assert row.status == "ok", row.reason
    assert row.figures["share_of_reference"] == 1.0


@pytest.mark.parametrize("name", [footprint.REFERENCE, *footprint.FEW_BITS])
def test_footprint_writes_and_loads_every_contestant(name, tmp_path):
    footprint._write(name, tmp_path, footprint._tiny)
    footprint._run(footprint._load(name, str(tmp_path)))
