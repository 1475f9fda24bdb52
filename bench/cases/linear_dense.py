"""A dense linear layer: PyTorch, oneDNN's packed weights, onnxruntime's MatMul, and filbert.

onnxruntime's MatMul adds no bias, the others do. What is fused to filbert's product is timed as
further contestants, and checked against what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ours import compiled_filbert
from ..peak import Work, kind_of
from ..results import Row
from ..runner import Options, on_gpu
from ..sweep import sweep
from ..timing import Contestant

NAME = "linear_dense"
ABOUT = "a dense layer: F.linear, oneDNN packed, onnxruntime MatMul, filbert and what it fuses"
REFERENCE = "F.linear"
RATE = ("operations_per_s", "GFLOP/s", 1e-9)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Size:
    """``rows`` rows through a layer of ``inputs`` and ``outputs``."""

    rows: int
    inputs: int
    outputs: int


#: the layers of BERT-base and MiniLM
WORKLOADS = {
    f"{inputs}x{outputs}-m{rows}": Size(rows, inputs, outputs)
    for inputs, outputs in ((768, 768), (768, 3072), (3072, 768), (384, 1536), (1536, 384))
    for rows in (1, 8, 32, 64, 512, 2048)
}


class _Layer:
    """One layer in every form it is run in."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        del device  # the CPU
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.ops, self.size = compiled_filbert().ops, size
        self.x, self.weight = normal(size.rows, size.inputs), normal(size.outputs, size.inputs)
        self.bias, self.residual = normal(size.outputs), normal(size.rows, size.outputs)
        self.gamma, self.beta = normal(size.outputs), normal(size.outputs)

    def right_answer(self) -> Tensor:
        return self.x.double() @ self.weight.double().T + self.bias.double()

    def linear(self) -> Contestant:
        return Contestant(REFERENCE, lambda: F.linear(self.x, self.weight, self.bias), lambda y: y)

    def onednn(self) -> Contestant:
        from filbert.nn.dense.backends import OneDNN

        packed = OneDNN(self.weight, self.x.dtype)
        return Contestant(
            "oneDNN packed", lambda: packed.product(self.x, self.bias, None), lambda y: y
        )

    def onnxruntime(self) -> Contestant:
        import onnx
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
            for name, width in (("x", self.size.inputs), ("y", self.size.outputs))
        ]
        weight = numpy_helper.from_array(self.weight.T.contiguous().numpy(), "w")
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], [weight])
        model = helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads spin during a run, and not on into the next contestant's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = {"x": self.x.numpy()}
        return Contestant(
            "onnxruntime MatMul", lambda: session.run(None, given)[0],
            lambda y: torch.from_numpy(y) + self.bias, note="without the bias",
        )  # fmt: skip

    def ours(self, name: str = "filbert", weight: torch.dtype | None = None) -> Contestant:
        packed = self.ops.pack_dense(self.weight.to(weight or self.weight.dtype))

        def run() -> Tensor:
            return self.ops.linear_dense(self.x, packed, self.size.outputs, self.bias)

        # A weight of fewer bits is another number, which its own check would have to know.
        lost = 0.0
        if weight is not None:
            rounded = self.weight.double() - self.weight.to(weight).double()
            lost = self.x.double() @ rounded.T
        return Contestant(name, run, lambda y: y.double() + lost)

    def fused(self, name: str) -> Contestant:
        packed = self.ops.pack_dense(self.weight)
        # What is fused is undone by subtracting what the plain product differs by.
        plain = self.ops.linear_dense(self.x, packed, self.size.outputs, self.bias).double()
        if name == "gelu":
            meant = F.gelu(plain)

            def run() -> Tensor:
                return self.ops.linear_dense(self.x, packed, self.size.outputs, self.bias, "gelu")
        else:
            shape = (self.size.outputs,)
            total = plain + self.residual.double()
            meant = F.layer_norm(total, shape, self.gamma.double(), self.beta.double(), 1e-5)

            def run() -> Tensor:
                return self.ops.linear_dense(
                    self.x, packed, self.size.outputs, self.bias, "none", self.residual,
                    self.gamma, self.beta, 1e-5,
                )  # fmt: skip

        return Contestant(f"filbert + {name}", run, lambda y: y.double() - meant + plain)

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        found: dict[str, Callable[[], Contestant]] = {
            REFERENCE: self.linear, "oneDNN packed": self.onednn,
        }  # fmt: skip
        if self.x.dtype == torch.float32:
            found["onnxruntime MatMul"] = self.onnxruntime
        found["filbert"] = self.ours
        for name in ("gelu", "norm"):
            found[f"filbert + {name}"] = lambda name=name: self.fused(name)  # type: ignore[misc]
        if self.x.dtype == torch.float32:
            found["filbert, float16 weight"] = lambda: self.ours(
                "filbert, float16 weight", torch.float16
            )
        return found


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    """Each multiply-add once, each weight and row once; a weight of float16 has half the bytes."""
    flop = 2.0 * size.rows * size.inputs * size.outputs
    weight = 2 if who.endswith("float16 weight") else dtype.itemsize
    rows = size.rows * (size.inputs + size.outputs) * dtype.itemsize
    return Work({kind_of(dtype): flop}, rows + size.inputs * size.outputs * weight)


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    if on_gpu(options.device):
        raise SystemExit("linear_dense: dense products on a GPU are cuBLASLt's; need --device cpu")
    return sweep(
        options, WORKLOADS, _Layer, work,
        figure=RATE[0], reference=lambda _: REFERENCE, tolerance=TOLERANCE, budget_s=4.0,
    )  # fmt: skip
