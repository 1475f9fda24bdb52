"""What races on a GPU, as far as it can be tested without one."""

from __future__ import annotations

import importlib
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench.cases import attn_varlen, bias_gelu, e2e, gather_rows, rate
from bench.report.table import markdown
from bench.results import Report
from bench.runner import Options
from bench.timing import Contestant, Unavailable, WallClock

import filbert
from bench import (
    baselines,
    check,
    engines,
    environment,
    gpu_attention,
    ours,
    runtimes,
    sweep,
    workloads,
)
from stand_in_gpu import CEILING, stand_in

# Attention


@pytest.mark.parametrize("name", ["d64-max16", "d32-max512", "d64-all128"])
def test_a_gpu_gets_a_batch_that_fills_it_and_says_so(name):
    mix = attn_varlen.WORKLOADS[name]
    assert mix.on("cpu") is mix
    assert mix.batch == 16
    large = mix.on("cuda:0")
    assert large.name == f"{name}-32k"
    assert sum(large.lengths) == pytest.approx(32 << 10, rel=0.02)
    assert max(large.lengths) == mix.maximum
    fewer = replace(large, tokens=1024)
    note = attn_varlen.padded(fewer, attn_varlen.inputs(fewer, torch.half, "cpu")).note
    assert note == f"{fewer.batch} sequences"


def test_attention_counts_the_bytes_of_its_operands_once():
    mix = attn_varlen.Mix(dim=8, maximum=3, mixed=False)
    # For each of 48 rows and 12 heads: q, k, v and out of 8 values, and one float32.
    assert mix.moved(torch.float16) == 48 * 12 * (4 * 8 * 2 + 4)
    assert mix.moved(torch.float32) == 48 * 12 * (4 * 8 * 4 + 4)


SMALL = attn_varlen.Mix(dim=32, maximum=20, mixed=True, tokens=150)


def small(dtype=torch.float32):
    return attn_varlen.inputs(SMALL, dtype, "cpu")


def passes(racer, qkv, tolerance=1e-5):
    outcome = check.check(
        racer.result(racer.run()), attn_varlen.right_answer(SMALL, qkv), tolerance
    )
    return outcome.passed


def test_the_document_mask_lets_a_row_see_its_own_sequence_only():
    from torch.nn.attention.flex_attention import flex_attention

    qkv = small()
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in qkv.unbind(1))
    mask = gpu_attention.document_mask(SMALL.lengths, qkv.device)
    with pytest.warns(UserWarning, match="compile"):
        out = flex_attention(q, k, v, block_mask=mask)
    racer = Contestant("flex", lambda: out, lambda value: value[0].transpose(0, 1))
    assert passes(racer, qkv)


def packed_attention(q, k, v, cu_q, cu_k, max_q, max_k):
    """What FlashAttention's interfaces compute, by one SDPA call for each sequence."""
    assert cu_q.dtype == torch.int32
    assert int(cu_q.diff().max()) <= max_q == max_k
    assert torch.equal(cu_q, cu_k)
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1).unsqueeze(0).float() for t in (q, k, v))
        )[0].transpose(0, 1)
        for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
    ]
    return torch.cat(parts).to(q.dtype)


@pytest.fixture
def others(monkeypatch):
    """Packed attention of others that runs here: the same calls, other kernels."""
    calls = SimpleNamespace(function=packed_attention)

    def call(*args):
        return calls.function(*args)

    varlen = importlib.import_module("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", call)
    flash = SimpleNamespace(flash_attn_varlen_func=lambda *args: (call(*args), None))
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(gpu_attention.importlib.util, "find_spec", lambda name: name)
    return calls


BUILDERS = pytest.mark.parametrize(
    "build", [gpu_attention.varlen_attn, gpu_attention.flash_attn], ids=lambda b: b.__name__
)


@BUILDERS
def test_packed_attention_of_others_is_called_right(build, others):
    qkv = small(torch.bfloat16)
    racer = build(SMALL, qkv)
    assert passes(racer, qkv, 1e-2)
    assert racer.note == ""


@BUILDERS
def test_one_that_refuses_views_gets_copies_and_a_note(build, others):
    def picky(q, *rest):
        if not q.is_contiguous():
            raise RuntimeError("q must be contiguous")
        return packed_attention(q, *rest)

    others.function = picky
    qkv = small(torch.bfloat16)
    racer = build(SMALL, qkv)
    assert passes(racer, qkv, 1e-2)
    assert "must be contiguous" in racer.note


@BUILDERS
def test_one_that_cannot_run_is_unavailable_with_its_reason(build, others):
    def broken(*_):
        raise NotImplementedError("no kernel for this GPU")

    others.function = broken
    with pytest.raises(Unavailable, match="no kernel for this GPU"):
        build(SMALL, small(torch.bfloat16))
    with pytest.raises(Unavailable, match="float16 and bfloat16 only"):
        build(SMALL, small(torch.float32))


def test_absent_packages_are_unavailable(monkeypatch):
    monkeypatch.setattr(gpu_attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="not installed"):
        gpu_attention.flash_attn(SMALL, small(torch.half))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(Unavailable, match=r"no torch\.nn\.attention\.varlen"):
        gpu_attention.varlen_attn(SMALL, small(torch.half))


def test_calls_fit_the_operators_on_cuda_tensors_that_hold_nothing(monkeypatch):
    """torch can follow shapes and devices of CUDA tensors where there is no GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from filbert import _load

    monkeypatch.setattr(_load, "why_no_kernels", lambda device: None)
    rows = sum(SMALL.lengths)
    with FakeTensorMode(allow_non_fake_inputs=True):
        qkv = torch.empty(rows, 3, attn_varlen.HEADS, SMALL.dim, dtype=torch.half, device="cuda")
        for build in (gpu_attention.varlen_attn, attn_varlen.ours, attn_varlen.ours_alone):
            racer = build(SMALL, qkv)
            out = racer.result(racer.run())
            assert out.shape == (rows, attn_varlen.HEADS, SMALL.dim), racer.name
            assert out.device.type == "cuda"
            assert out.dtype == torch.half
    # Only the one that shares the list of tiles leaves something untimed.
    assert "not timed" not in racer.note


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Cases take the road they take on a GPU; tensors stay on the CPU, the wall clock ticks."""
    for module in (attn_varlen, sweep):
        monkeypatch.setattr(module, "on_gpu", lambda device: True)
        monkeypatch.setattr(module, "ceilings_of", lambda options: dict(CEILING))
    monkeypatch.setattr(sweep, "kernel_clock", lambda options: WallClock())
    monkeypatch.setattr(attn_varlen, "GPU_TOKENS", 1024)


def test_attention_rows_have_rates_and_shares_of_the_floor(as_on_a_gpu, others, monkeypatch):
    options = Options(
        workloads=("d32-max16",), baselines=("varlen_attn",), dtypes=("bfloat16",), repeats=3,
        budget_s=0.2,
    )  # fmt: skip
    rows = {row.contestant: row for row in attn_varlen.run(options)}
    assert set(rows) == {"SDPA, padded", "varlen_attn", "filbert", "filbert, own tiles"}
    mix = attn_varlen.Mix(32, 16, True, 1024)
    for row in rows.values():
        assert row.status == "ok", row.reason
        assert row.workload == "d32-max16-1k"
        floor = mix.moved(torch.bfloat16) / CEILING["bytes_per_s"]  # few operations per byte
        assert row.figures["share_of_floor"] == pytest.approx(floor / row.figures["median_s"])
        assert row.figures["bytes_per_s"] == pytest.approx(
            mix.moved(torch.bfloat16) / row.figures["median_s"]
        )
    own = rows["filbert"].figures["ratio_to_varlen_attn"]
    assert own == statistics.median(rows["varlen_attn"].ratios_of(rows["filbert"]))
    assert "ratio_to_varlen_attn" not in rows["varlen_attn"].figures
    stand_in(monkeypatch)
    about = environment.environment("cuda", 2)
    about["gpu"]["ceilings"] = CEILING
    report = Report("attn_varlen", about, {}, list(rows.values()))
    text = markdown(report, rate(report))
    head = next(line for line in text.splitlines() if line.startswith("| contestant"))
    for title in ("TFLOP/s", "× varlen_attn", "GB/s", "of the floor"):
        assert f"| {title} |" in head
    assert "per sequence" not in head  # nobody ran it
    assert "700 TFLOP/s" in text
    assert "3000 GB/s" in text
    report.environment["device"] = "cpu"
    assert "GFLOP/s" in markdown(report, rate(report))


def test_on_the_cpu_attention_has_its_three_contestants_and_no_floor():
    options = Options(workloads=("d32-max16",), dtypes=("float32",), repeats=2, budget_s=0.1)
    rows = attn_varlen.run(options)
    assert [row.contestant for row in rows] == [*attn_varlen.BUILDERS, "peak: fma", "peak: copy"]
    for row in rows:
        assert row.status == "ok", row.reason
        assert not {"share_of_floor", "bytes_per_s"} & set(row.figures)


# Row kernels


@pytest.fixture
def tiny_sizes(monkeypatch):
    monkeypatch.setattr(bias_gelu, "WORKLOADS", {"6x24": bias_gelu.Size(6, 24)})
    batches = [gather_rows.Batch(unpacks, 5, 10, 24) for unpacks in (False, True)]
    monkeypatch.setattr(gather_rows, "WORKLOADS", {batch.name: batch for batch in batches})


@pytest.mark.parametrize("gpu_road", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("case", [bias_gelu, gather_rows], ids=lambda case: case.NAME)
def test_row_cases_check_and_time_everyone(case, gpu_road, tiny_sizes, request):
    if gpu_road:
        request.getfixturevalue("as_on_a_gpu")
    rows = case.run(Options(repeats=2, budget_s=0.1))
    names = {row.contestant for row in rows}
    assert {"copy_", "clone"} < names
    assert any(name.startswith("filbert") for name in names)
    for row in rows:
        assert row.status == "ok", (row.key, row.reason)
        assert row.figures["bytes_per_s"] > 0
        assert ("share_of_floor" in row.figures) == gpu_road
        if row.contestant == "copy_":
            assert row.figures["share_of_copy"] == pytest.approx(1.0)


def test_gelu_in_place_gets_its_input_back_before_every_run():
    given = bias_gelu._Inputs(bias_gelu.Size(4, 16), torch.float32, "cpu")
    racer = bias_gelu.ours(given)
    value, _ = WallClock().time(racer.run, 5, racer.before)
    outcome = check.check(racer.result(value), given.right_answer(), 1e-5)
    assert outcome.passed, outcome
    value, _ = WallClock().time(racer.run, 5)  # without it, it eats its own results
    assert not check.check(racer.result(value), given.right_answer(), 1e-5).passed


def test_gather_counts_kept_rows_written_rows_and_indices():
    pack, unpack = (gather_rows.Batch(unpacks, 5, 10, 24) for unpacks in (False, True))
    kept = sum(pack.lengths)
    assert kept == 30
    assert pack.moved(torch.float16) == 2 * kept * 24 * 2 + 8 * kept
    assert unpack.moved(torch.float16) == (kept + 50) * 24 * 2 + 8 * 50


# Whole models


def test_each_device_has_the_contestants_that_can_run_there():
    here = e2e.builders(Options(), "float32", pooled=True)
    there = e2e.builders(Options(device="cuda"), "float16", pooled=True)
    assert set(there) - set(here) == set(e2e.GPU_ONLY)
    assert not set(here) - set(there)


@pytest.mark.parametrize(
    "build", [runtimes.onnx_runtime, runtimes.openvino("f32"), baselines.prototype],
    ids=["onnxruntime", "openvino", "prototype"],
)  # fmt: skip
def test_runtimes_for_the_cpu_say_so_on_a_gpu_without_being_imported(build, monkeypatch):
    def refuse(name, *_):
        pytest.fail(f"{name} was imported")

    setup = tiny_setup("cuda")
    monkeypatch.setattr(runtimes.importlib, "import_module", refuse)
    with pytest.raises(Unavailable, match="CPU only"):
        build(setup)


def tiny_setup(device="cpu", pooled=False):
    work = replace(workloads.WORKLOADS["tiny"](), pooled=pooled)
    return engines.Setup(workloads.model("tiny"), work, torch.float32, device, 1)


@pytest.mark.parametrize("build", [ours.filbert_captured, baselines.torch_compile_graphs])
def test_graphs_need_a_gpu(build):
    with pytest.raises(Unavailable, match="GPU"):
        build(tiny_setup())


class Runner:
    """Stands for a captured model: refuses what only lies on a device."""

    def __init__(self, model, buckets, *, max_sequences):
        self.model, self.buckets, self.max_sequences = model, buckets, max_sequences

    def __call__(self, input_ids, attention_mask, pooling=None):
        assert input_ids.device.type == attention_mask.device.type == "cpu"
        assert int(attention_mask.sum()) <= max(self.buckets)
        assert len(input_ids) <= self.max_sequences
        with torch.inference_mode():
            hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return engines.mean_pool(hidden, attention_mask) if pooling == "mean" else hidden


@pytest.mark.parametrize("pooled", [False, True])
def test_a_captured_model_gets_tokens_on_the_host_and_a_bucket_that_holds_them(monkeypatch, pooled):
    monkeypatch.setattr(filbert, "capture", Runner)
    engine = ours.filbert_captured(tiny_setup("cuda", pooled))
    assert engine.note == "graphs of 64 tokens"
    racer = engines.contestant("x", engine, tiny_setup("cuda", pooled))
    right = engines.reference_answer(tiny_setup(pooled=pooled))
    outcome = check.check(racer.result(racer.run()), right, e2e.TOLERANCE["float32"])
    assert outcome.passed, outcome


def test_a_capture_that_is_refused_or_absent_is_unavailable(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("model: got one on cpu\nsecond line")

    monkeypatch.setattr(filbert, "capture", refuse)
    with pytest.raises(Unavailable, match=r"capture\(\) refused: model: got one on cpu$"):
        ours.filbert_captured(tiny_setup("cuda"))
    monkeypatch.delattr(filbert, "capture")
    with pytest.raises(Unavailable, match=r"no capture\(\)"):
        ours.filbert_captured(tiny_setup("cuda"))


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 32), (33, 64), (65, 128), (128, 128), (2458, 2560)]
)
def test_buckets_do_not_know_the_exact_number_of_tokens(tokens, size):
    assert ours.bucket(tokens) == size


def test_results_of_compiled_graphs_outlive_the_next_run(monkeypatch):
    memory = torch.zeros(2, 3)
    asked = []

    def compiled(setup, options, note):
        asked.append(options)
        return engines.Engine(lambda ids, mask: memory.copy_(ids), note=note)

    steps = []
    monkeypatch.setattr(baselines, "_compiled", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append("step"))
    engine = baselines.torch_compile_graphs(tiny_setup("cuda"))
    first = engine.forward(torch.ones(2, 3), None)
    engine.forward(torch.full((2, 3), 2.0), None)
    assert (first == 1).all()
    assert len(steps) == 2
    assert asked == [{"triton.cudagraphs": True}]
    assert "CUDA graphs" in engine.note
