"""ONNX Runtime and OpenVINO, each set up as its own documentation advises for BERT on a CPU."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import first_line, hugging_face
from .engines import Engine, Setup
from .environment import cpu
from .timing import Unavailable

INPUTS = ("input_ids", "attention_mask")


class _HiddenStates(nn.Module):
    """Two tensors in, one out: what exporters can trace."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return found.last_hidden_state


def _example() -> tuple[Tensor, Tensor]:
    """Inputs to trace with; one row is padded, or a mask that is all ones would be traced away."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    return torch.ones(2, 16, dtype=torch.int64), mask


def _only_cpu(setup: Setup, runtime: str) -> None:
    if setup.device != "cpu":
        raise Unavailable(f"{runtime} is set up for the CPU only in this bench")


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters warn about every branch of the model's Python; the check is what counts."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _export(setup: Setup, path: Path) -> None:
    """Writes the float32 model as ONNX, by tracing its eager attention.

    Tracing plus eager attention is the one combination whose graph ONNX Runtime's BERT fusions
    recognise: from SDPA, and from the torch.export route, they fuse no attention (tried with
    torch 2.13, onnxruntime 1.32).
    """
    model = _HiddenStates(hugging_face(setup, "eager")).eval()
    axes = {name: {0: "batch", 1: "sequence"} for name in (*INPUTS, "hidden")}
    with _quietly():
        torch.onnx.export(
            model, _example(), str(path), input_names=list(INPUTS), output_names=["hidden"],
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip


def _fuse(path: Path, setup: Setup) -> tuple[Path, str]:
    """Applies onnxruntime.transformers' BERT fusions; says how many attentions were fused."""
    config = setup.model.config
    try:
        optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
        with _quietly():
            fused = optimizer.optimize_model(
                str(path), model_type="bert", num_heads=config.num_attention_heads,
                hidden_size=config.hidden_size, opt_level=0,
            )  # fmt: skip
        count = fused.get_fused_operator_statistics().get("Attention", 0)
        better = path.with_name("fused.onnx")
        fused.save_model_to_file(str(better))
    except Exception as error:  # the plain graph is still a fair contestant
        return path, f"BERT fusions failed: {first_line(error)}"
    return better, f"{count} of {config.num_hidden_layers} attentions fused"


def _quantize(path: Path) -> tuple[Path, str]:
    """Dynamic int8, a scale for each output. Without VNNI weights lose a bit, as ONNX Runtime's
    documentation advises: its sums would saturate."""
    quantization = importlib.import_module("onnxruntime.quantization")
    reduced = not {"avx512_vnni", "avx_vnni"} & set(cpu()["flags"])
    smaller = path.with_name("int8.onnx")
    with _quietly():
        quantization.quantize_dynamic(
            path, smaller, per_channel=True, reduce_range=reduced,
            weight_type=quantization.QuantType.QInt8, extra_options={"DefaultTensorType": 1},
        )  # fmt: skip
    return smaller, "weights of 7 bits" if reduced else "weights of 8 bits"


def onnx_runtime_int8(setup: Setup) -> Engine:
    """ONNX Runtime with dynamic int8, otherwise as :func:`onnx_runtime`."""
    return onnx_runtime(setup, int8=True)


def onnx_runtime(setup: Setup, int8: bool = False) -> Engine:
    """ONNX Runtime on the CPU: all graph optimisations, and the BERT fusions before them."""
    _only_cpu(setup, "ONNX Runtime")
    if setup.dtype != torch.float32:
        raise Unavailable("ONNX Runtime's CPU kernels for BERT compute in float32 only")
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise Unavailable("onnxruntime is not installed; try pip install onnxruntime") from error
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.onnx"
    try:
        _export(setup, path)
        path, note = _fuse(path, setup)
        if int8:
            path, how = _quantize(path)
            note = f"{note}, {how}"
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = setup.threads
        options.inter_op_num_threads = 1
        # Spin while running, as by default, but not into the next contestant's turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        folder.cleanup()
        raise Unavailable(f"{type(error).__name__}: {first_line(error)}") from error
    folder.cleanup()  # the session has its own copy of the weights

    def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(session.run(None, feeds)[0])

    return Engine(forward, note=note)


def _calibrated(graph: Any) -> Any:
    """An OpenVINO graph with int8 products, as NNCF quantizes transformers after training. The
    ranges of activations come from a few rows: they cost the same whatever they are."""
    try:
        nncf = importlib.import_module("nncf")
    except ImportError as error:
        raise Unavailable("nncf is not installed; try pip install nncf") from error
    example = {name: value.numpy() for name, value in zip(INPUTS, _example(), strict=True)}
    return nncf.quantize(
        graph, nncf.Dataset([example]), model_type=nncf.ModelType.TRANSFORMER, subset_size=1
    )


def openvino(hint: str, int8: bool = False) -> Callable[[Setup], Engine]:
    """A builder of OpenVINO engines with that ``INFERENCE_PRECISION_HINT`` ("f32", "bf16") for what
    is not int8."""

    def build(setup: Setup) -> Engine:
        _only_cpu(setup, "OpenVINO")
        try:
            ov = importlib.import_module("openvino")
        except ImportError as error:
            raise Unavailable("openvino is not installed; try pip install openvino") from error
        float32 = Setup(setup.model, setup.workload, torch.float32)
        try:
            with _quietly():
                traced = _HiddenStates(hugging_face(float32, "sdpa")).eval()
                graph = ov.convert_model(traced, example_input=_example())
                graph = _calibrated(graph) if int8 else graph
            settings = {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": setup.threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
            }
            compiled = ov.Core().compile_model(graph, "CPU", settings)
        except Unavailable:
            raise
        except Exception as error:
            raise Unavailable(f"{type(error).__name__}: {first_line(error)}") from error
        actual = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        request = compiled.create_infer_request()

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            feeds = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
            # The output is copied, as any caller must who runs a second batch.
            return torch.from_numpy(request.infer(feeds, share_inputs=True)[0])

        note = "" if actual == hint else f"runs {actual}: this CPU has no fast {hint}"
        return Engine(forward, note=note)

    return build
