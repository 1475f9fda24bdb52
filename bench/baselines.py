"""Everything that filbert is compared with and that runs inside PyTorch."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .engines import Engine, Forward, Setup
from .prototype import Prototype
from .timing import Unavailable
from .workloads import weight_sharing_copy


def hugging_face(setup: Setup, attention: str) -> Any:
    """The model in the dtype of the run, with that attention implementation."""
    model = weight_sharing_copy(setup.model)
    if setup.dtype != torch.float32:
        model = model.to(setup.dtype)  # float32 keeps sharing its storage
    model.set_attn_implementation(attention)
    return model


def _call(model: Any) -> Forward:
    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return forward


def hf_eager(setup: Setup) -> Engine:
    return Engine(_call(hugging_face(setup, "eager")))


def hf_sdpa(setup: Setup) -> Engine:
    return Engine(_call(hugging_face(setup, "sdpa")))


def sdpa_buckets(setup: Setup) -> Engine:
    """SDPA on batches of similar length: what careful users do today."""
    if len(setup.workload.sequences) == 1:
        raise Unavailable("one sequence: nothing to sort")
    return Engine(
        _call(hugging_face(setup, "sdpa")),
        batches=lambda workload, device: workload.sorted_batches(device),
    )


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises :class:`Unavailable` in the main thread when the block takes longer."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise Unavailable(f"{what} took longer than {seconds:.0f} s and was given up")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget_compiled() -> None:
    """Drops what was compiled for earlier workloads: versions of one model's code are counted, and
    beyond a limit torch.compile runs it uncompiled. Not between contestants of one race, which
    would compile again while they are timed."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def torch_compile(setup: Setup) -> Engine:
    """torch.compile; on the CPU with frozen weights, so that Inductor may re-order them as we do.

    Batches of one shape are compiled for that shape; of several, for dynamic shapes.
    """
    if setup.device != "cpu":
        return _compiled(setup, {}, "")
    # One compiler process: a pool would linger and take cores from the contestants after it.
    return _compiled(setup, {"freezing": True, "compile_threads": 1}, ", frozen weights")


def torch_compile_graphs(setup: Setup) -> Engine:
    """torch.compile that replays CUDA graphs: the launches of a forward cost next to nothing."""
    if setup.device == "cpu":
        raise Unavailable("CUDA graphs need a GPU")
    engine = _compiled(setup, {"triton.cudagraphs": True}, ", CUDA graphs")
    inner = engine.forward
    assert inner is not None

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Every run writes the same memory; a caller who keeps its result copies it.
        torch.compiler.cudagraph_mark_step_begin()
        return inner(input_ids, attention_mask).clone()

    return Engine(forward, note=engine.note)


def _compiled(setup: Setup, options: dict[str, Any], note: str) -> Engine:
    model = hugging_face(setup, "sdpa")
    batches = setup.workload.batches(setup.device)
    shapes = {tuple(batch.input_ids.shape) for batch in batches}
    compiled = torch.compile(model, dynamic=len(shapes) > 1, options=options)
    forward = _call(compiled)
    start = time.perf_counter()
    try:
        with (
            time_limit(setup.compile_limit_s, "compilation"),
            warnings.catch_warnings(),
            torch.inference_mode(),
        ):
            warnings.simplefilter("ignore")
            for batch in batches[:2]:
                forward(batch.input_ids, batch.attention_mask)
    except Exception as error:
        took = time.perf_counter() - start
        if took >= setup.compile_limit_s:  # Dynamo may have wrapped the alarm in its own error
            reason = f"compilation took longer than {setup.compile_limit_s:.0f} s and was given up"
            raise Unavailable(reason) from error
        raise Unavailable(f"torch.compile failed: {first_line(error)}") from error
    shape = "dynamic shapes" if len(shapes) > 1 else "static shape"
    return Engine(forward, note=f"{shape}{note}")


def prototype(setup: Setup) -> Engine:
    if setup.device != "cpu":
        raise Unavailable("its oneDNN linear layers run on the CPU only")
    try:
        model = Prototype(hugging_face(setup, "sdpa"), setup.workload.tokens)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise Unavailable(first_line(error)) from error
    return Engine(model)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The head of an error's message: reasons stand in table cells."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit]
