"""`make gpu-check` on a machine without a GPU: it says so, and every part of it works."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench.gpu_check import exercise, libraries, process, report, sanitizer
from bench.gpu_check.process import FAILED, NOT_RUN, PASSED, Deadline, Ended

from filbert import _load
from filbert.ops.shared import calling
from stand_in_gpu import H100, stand_in

ROOT = Path(__file__).parents[2]
#: no GPU, whatever the machine has
BLIND = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "python")}
LIBRARIES = ROOT / "build" / "dev"


def gpu_check(*arguments, **environ):
    command = [sys.executable, "-m", "bench.gpu_check", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=BLIND | environ, capture_output=True, text=True, timeout=300
    )


def ended(status=0, output="", cut=False, seconds=3.0):
    return Ended(status, output, seconds, cut)


# The whole of it


def test_without_a_gpu_it_says_so_in_a_line_and_fails(tmp_path):
    done = gpu_check(OUT=str(tmp_path / "out"))
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert "needs an NVIDIA GPU" in line
    assert torch.__version__ in line
    assert not (tmp_path / "out").exists()


def test_why_no_gpu_tells_a_cpu_torch_from_a_machine_without_one(monkeypatch):
    main = importlib.import_module("bench.gpu_check.__main__")
    monkeypatch.setattr(main, "torch", SimpleNamespace(
        __version__="2.11.0", version=SimpleNamespace(cuda=None),
        cuda=SimpleNamespace(is_available=lambda: False),
    ))  # fmt: skip
    assert "without CUDA" in main.why_no_gpu()
    main.torch.version.cuda = "13.0"
    assert "sees no GPU" in main.why_no_gpu()
    main.torch.cuda.is_available = lambda: True
    assert main.why_no_gpu() is None


def test_make_needs_no_environment_of_its_own():
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    for arguments in ("", " --only bench --resume"):
        done = subprocess.run(
            ["make", "-n", "gpu-check", "PYTHON=some-python", f"ARGS={arguments.strip()}"],
            cwd=ROOT, capture_output=True, text=True, env=outside | {"PYTHONPATH": "/elsewhere"},
        )  # fmt: skip
        assert done.stdout.splitlines() == [
            f"PYTHONPATH=python:/elsewhere some-python -m bench.gpu_check{arguments}"
        ]


def test_a_rehearsal_runs_every_kind_of_step_and_leaves_three_files(tmp_path):
    if not (LIBRARIES / "libfilbert_ops.so").exists():
        pytest.skip("the libraries are not in build/dev: filbert was installed in another way")
    done = gpu_check("--rehearse", OUT=str(tmp_path), FILBERT_LIBRARY_DIR=str(LIBRARIES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "gpu-check.json", "gpu-check.md", "gpu-check.log"
    }  # fmt: skip
    data = json.loads((tmp_path / "gpu-check.json").read_text())
    assert data["schema"] == report.SCHEMA
    assert data["passed"] is True
    steps = {step["name"]: step for step in data["steps"]}
    assert steps["libraries"]["data"]["origin"] == "given"
    assert set(steps["libraries"]["data"]["sha256"]) >= {"libfilbert_ops.so"}
    assert data["tests"]["passed"] > 0
    assert data["tests"]["failed"] == 0
    assert steps["every kernel once"]["details"][0].endswith("0 wrong")
    assert {bench["case"] for bench in data["bench"]} == {
        "attn_varlen", "e2e", "gather_rows", "linear_binary",
    }  # fmt: skip
    assert {bench["environment"]["device"] for bench in data["bench"]} == {"cuda"}
    assert data["environment"]["filbert"]["compiled"] is True
    assert {aim["verdict"] for aim in data["aims"]} == {"not run"}
    table = (tmp_path / "gpu-check.md").read_text()
    assert "## gather_rows" in table
    assert "✓ passed" in done.stdout
    assert str(ROOT) not in table + json.dumps(data)
    assert "passed" in (tmp_path / "gpu-check.log").read_text()
    # Once more: only what finds the libraries runs again.
    arguments = ("--rehearse", "--resume", "--only", "bench")
    done = gpu_check(*arguments, OUT=str(tmp_path), FILBERT_LIBRARY_DIR=str(LIBRARIES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 steps of an earlier call are kept" in done.stderr
    assert done.stderr.count("gpu-check: ") == 2
    assert json.loads((tmp_path / "gpu-check.json").read_text())["bench"] == data["bench"]


def test_without_libraries_nothing_else_runs_and_the_report_says_why(tmp_path):
    done = gpu_check("--rehearse", "--out", tmp_path, "--libraries", tmp_path / "empty")
    assert done.returncode == 1
    data = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [step["name"] for step in data["steps"]] == ["libraries"]
    assert "no libfilbert_ops.so in empty" in data["steps"][0]["details"][0]
    assert "Something failed" in (tmp_path / "gpu-check.md").read_text()


# Programs with a time limit


def test_run_keeps_output_and_status():
    found = process.run([sys.executable, "-c", "print('hello'); raise SystemExit(3)"], 60)
    assert (found.status, found.output, found.cut) == (3, "hello\n", False)
    assert found.how == "ended with status 3"
    assert process.run(["/no/such/program"], 5).status == 127


def test_a_program_beyond_its_limit_is_interrupted_so_that_it_can_still_report():
    """Also where this process hears no interrupts, as what a script starts with & does not."""
    code = """
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("wrote its report")
"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = process.run([sys.executable, "-u", "-c", code], 2.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.cut
    assert "wrote its report" in found.output
    assert found.seconds < 30


def test_a_program_can_be_interrupted_where_this_one_cannot(monkeypatch):
    """What a shell puts in the background ignores interrupts, and so does all that it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = process.run(
            [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT))"], 60
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert "default_int_handler" in found.output


@pytest.mark.parametrize("stubborn", [False, True], ids=["obeys", "ignores"])
def test_a_program_beyond_its_limit_goes_with_all_its_children(monkeypatch, tmp_path, stubborn):
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    alive = tmp_path / "alive"
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    child = tmp_path / "child.py"
    child.write_text(
        f"{ignore}\nimport pathlib, time\n"
        f"while True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)\n"
    )
    code = f"""
import subprocess, sys, time
{ignore if stubborn else ""}
subprocess.Popen([sys.executable, {str(child)!r}])
time.sleep(60)
"""
    found = process.run([sys.executable, "-c", code], 4.0)
    assert found.cut
    assert found.how.startswith("stopped after")
    assert alive.exists()
    time.sleep(0.3)
    alive.unlink()
    time.sleep(0.3)
    assert not alive.exists()


def test_a_deadline_gives_what_is_left_and_nothing_where_that_is_too_little():
    assert Deadline(1000.0).limit(90.0, 20.0) == 90.0
    kept_back = process.GRACE_S + process.RESERVE_S
    assert Deadline(50.0 + kept_back).limit(90.0, 20.0) == pytest.approx(50.0, abs=1)
    assert Deadline(10.0 + kept_back).limit(90.0, 20.0) is None
    assert Deadline(0.0).left_s == 0.0


# Libraries


class Programs:
    """Stands for running programs: says how each ends, remembers what was asked."""

    def __init__(self, *ends):
        self.ends, self.calls = list(ends), []

    def __call__(self, command, limit_s, env):
        self.calls.append((list(command), env))
        return self.ends.pop(0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A GPU machine with nvcc, and a tree in ``tmp_path``."""
    monkeypatch.setattr(libraries, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(libraries, "toolkit", lambda program: f"/toolkit/{program}")
    return tmp_path


def built(folder):
    folder.mkdir(parents=True)
    for name in libraries.NAMES:
        (folder / name).write_bytes(name.encode())
    return folder


WORKS = ended(0, "6 calls, 0 wrong, built for sm 90, CUDA 13.0\n")


def test_libraries_that_work_are_taken_and_told_apart(machine):
    folder = built(machine / "given")
    run = Programs(WORKS)
    found = libraries.Libraries(folder, "cuda", run)
    step = found.find(Deadline(400))
    assert step.status == PASSED
    assert found.folder == folder
    assert step.data["origin"] == "given"
    assert "sm 90" in step.details[0]
    assert step.data["sha256"]["libfilbert_ops.so"] != step.data["sha256"]["libfilbert_cuda.so"]
    ((command, env),) = run.calls
    assert command[-2:] == ["--device", "cuda"]
    assert env["FILBERT_LIBRARY_DIR"] == str(folder)
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(machine / "python")


def test_libraries_that_do_not_run_here_are_built_for_this_gpu(machine):
    built(machine / "build" / "dev")

    class Build(Programs):
        def __call__(self, command, limit_s, env):
            if "--build" in command:
                built(machine / "build" / "gpu")
            return super().__call__(command, limit_s, env)

    run = Build(ended(1, "GLIBC_2.99 not found\n"), ended(), ended(), WORKS)
    found = libraries.Libraries(None, "cuda", run)
    step = found.find(Deadline(400))
    assert step.status == PASSED
    assert found.folder == machine / "build" / "gpu"
    assert step.data["origin"] == "built here"
    assert "GLIBC_2.99 not found" in step.data["tried"][0]
    (configure, env), (build, _) = run.calls[1:3]
    for setting in (
        "-DFILBERT_CUDA=ON", "-DFILBERT_CUDA_ARCHS=90", "-DFILBERT_PYTHON_MODULE=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
    ):  # fmt: skip
        assert setting in configure
    assert env["CUDACXX"] == os.environ.get("CUDACXX", "/toolkit/nvcc")
    assert build[-4:-1] == ["--build", str(machine / "build" / "gpu"), "--parallel"]
    assert run.calls[3][1]["FILBERT_LIBRARY_DIR"] == str(machine / "build" / "gpu")


def test_whatever_was_built_last_is_tried_first(machine):
    """Libraries that were carried to a machine may lie in any folder of build/."""
    for age, name in enumerate(("carried", "dev", "half")):
        folder = built(machine / "build" / name)
        os.utime(folder / "libfilbert_cuda.so", (1e9 - age, 1e9 - age))
    (machine / "build" / "half" / "libfilbert_ops.so").unlink()
    run = Programs(ended(1, "GLIBC_2.99 not found\n"), WORKS)
    found = libraries.Libraries(None, "cuda", run)
    step = found.find(Deadline(400))
    assert step.status == PASSED
    assert found.folder == machine / "build" / "dev"
    assert step.data["origin"] == "build/dev"
    assert step.data["tried"] == ["build/carried: ended with status 1: GLIBC_2.99 not found"]


def test_a_build_that_fails_is_told_with_its_last_lines(machine):
    run = Programs(ended(), ended(2, "many lines\nattn_varlen.cu: error: expected a ;\n"))
    found = libraries.Libraries(None, "cuda", run)
    step = found.find(Deadline(400))
    assert step.status == FAILED
    assert found.folder is None
    assert "no libfilbert_ops.so and no libfilbert_cuda.so" in step.details[0]
    assert "expected a ;" in step.details[1]
    assert any("expected a ;" in output for _, output in found.log)


@pytest.mark.parametrize(
    ("limit", "tool", "reason"), [(400, None, "no nvcc"), (15, "/nvcc", "no time was left")]
)
def test_what_cannot_be_built_says_why(machine, monkeypatch, limit, tool, reason):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(libraries, "toolkit", lambda program: tool)
    step = libraries.Libraries(None, "cuda", Programs()).find(Deadline(limit))
    assert step.status == FAILED
    assert reason in step.details[1]


def test_the_toolkit_is_found_off_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    program = tmp_path / "cuda" / "bin" / "a-program-of-no-other-toolkit"
    assert libraries.toolkit(program.name) is None
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert libraries.toolkit(program.name) == str(program)


# What the sanitizers watch


def worst(found):
    return [(name, error, limit) for name, error, limit in found if not error <= limit]


def test_the_exercise_passes_on_the_cpu_and_names_what_is_wrong(monkeypatch, capsys):
    assert worst(exercise.outcomes("cpu", False)) == []
    monkeypatch.setattr(sys, "argv", ["exercise", "--device", "cpu", "--quick"])
    assert exercise.main() == 0
    assert "0 wrong" in capsys.readouterr().out
    filbert = importlib.import_module("filbert")
    right = filbert.attn_varlen

    def forgets_the_last_row(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        out[-1] = float("nan")
        return out, lse

    monkeypatch.setattr(filbert, "attn_varlen", forgets_the_last_row)
    assert exercise.main() == 1
    printed = capsys.readouterr().out
    assert "attn_varlen float32 D=64 [300, 2]: error inf" in printed
    assert "6 wrong" in printed


def test_the_exercise_passes_on_the_cuda_source_run_by_the_host(monkeypatch, hostcuda):

    monkeypatch.setattr(calling, "kernels", lambda: hostcuda)
    monkeypatch.setattr(exercise, "dtypes_on", lambda device: ["float16"])
    found = list(exercise.outcomes("cpu", False))
    assert any("float16 D=128" in name for name, _, _ in found)
    assert worst(found) == []


def test_the_exercise_tells_missing_libraries_and_missing_kernels(monkeypatch, capsys):
    from filbert import _load

    monkeypatch.setattr(sys, "argv", ["exercise"])
    monkeypatch.setitem(_load.missing, "cuda", "libfilbert_cuda could not be loaded: no glibc")
    assert exercise.main() == 1
    assert "no glibc" in capsys.readouterr().out
    monkeypatch.delitem(_load.missing, "cuda")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert exercise.main() == 1
    assert "no kernel for CUDA" in capsys.readouterr().out


def test_the_exercise_stops_in_time_with_something_of_every_kernel(monkeypatch, capsys):
    arguments = ["exercise", "--device", "cpu", "--limit-s", "1e-9"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert exercise.main() == 0
    assert capsys.readouterr().out.endswith(f"1 calls, 0 wrong, {exercise.UNFINISHED}\n")
    kernels = {name.split()[0] for name, _, _ in islice(exercise.outcomes("cpu", False), 130)}
    assert kernels == {
        "attn_varlen", "norm_residual", "norm_residual_", "bias_gelu_", "gather_rows", "pack_bits",
        "pack_codes", "linear_binary_bits", "linear_binary", "attn_binary", "quantize_rows",
        "ffn_lowrank", "linear_lowrank",
        "linear_grouped", "linear_grouped_codes", "norm_residual_codes", "embedding_grouped",
    }  # fmt: skip


def test_a_gpu_is_given_a_layer_with_more_large_tiles_than_multiprocessors(monkeypatch):
    stand_in(monkeypatch)
    ((rows, features, outputs),) = exercise.large("cuda")
    plan = _load.C.plan_linear_binary_cuda(
        rows=rows, outputs=outputs, row_words=-(-features // 32), planes=1,
        multiprocessors=H100.multi_processor_count, capability=90,
    )  # fmt: skip
    assert plan["tile_rows"] == 128
    assert plan["shared_bytes"] > 48 * 1024
    assert exercise.large("cpu") == []


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at filbert::attn_varlen_kernel+0x1a0
========= Program hit nothing else
144 calls, 0 wrong
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n144 calls, 0 wrong\n========= ERROR SUMMARY: 0 errors\n"
PARTLY = CLEAN.replace("144 calls, 0 wrong", f"90 calls, 0 wrong, {exercise.UNFINISHED}")
UNSUPPORTED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported.\n"


@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        (ended(0, CLEAN), PASSED, "ERROR SUMMARY: 0 errors"),
        (ended(sanitizer.FOUND, MEMCHECK), FAILED, "Invalid __global__ read of size 2 bytes"),
        (ended(1, CLEAN), FAILED, "ended with status 1"),
        (ended(-9, "=========", cut=True), FAILED, "stopped after 3 s"),
        (ended(0, PARTLY), NOT_RUN, "90 calls, 0 wrong, stopped at its time limit"),
        (ended(999, UNSUPPORTED), NOT_RUN, "does not support this device"),
    ],
    ids=["clean", "found", "wrong", "cut", "partly", "unsupported"],
)
def test_sanitizer_outcomes(how, status, words):
    found, details = sanitizer.outcome("memcheck", how)
    assert found == status
    assert any(words in line for line in details)


def test_the_sanitizer_watches_each_tensor_as_an_allocation(monkeypatch):
    monkeypatch.setattr(sanitizer, "toolkit", lambda program: f"/toolkit/{program}")
    run = Programs(ended(0, CLEAN))
    step, output = sanitizer.check("racecheck", Deadline(400), {"A": "b"}, run)
    assert step.status == PASSED
    assert output == CLEAN
    ((command, env),) = run.calls
    assert command[:3] == ["/toolkit/compute-sanitizer", "--tool", "racecheck"]
    assert command[command.index("--error-exitcode") + 1] == str(sanitizer.FOUND)
    assert command[-4:-1] == ["-m", "bench.gpu_check.exercise", "--limit-s"]
    assert float(command[-1]) == sanitizer.LIMIT_S - sanitizer.START_S  # it ends by itself
    assert env == {"A": "b", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert sanitizer.check("racecheck", Deadline(20), {}, run)[0].status == NOT_RUN
    monkeypatch.setattr(sanitizer, "toolkit", lambda program: None)
    assert "neither on PATH" in sanitizer.check("memcheck", Deadline(400), {}, run)[0].details[0]
