"""A linear layer of 2 to 8 bits: PyTorch, int8 of oneDNN and onnxruntime, its 4 bits, and filbert.

On a GPU: PyTorch, the int8 product of cuBLAS, and filbert.

Everybody is given rows of float32 and gives rows of float32, so that turning rows into codes is
timed. The one exception is cuBLAS, whose product is timed alone. Each has its own rounded weight,
and what that differs by is added to its result before it is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ours import compiled_filbert
from ..peak import Work, kind_of
from ..results import Row
from ..runner import Options, on_gpu
from ..sweep import sweep
from ..timing import Contestant, Unavailable

NAME = "linear_grouped"
ABOUT = "a layer of 2 to 8 bits: F.linear, int8 of oneDNN and onnxruntime, MatMulNBits, filbert"
REFERENCE = "F.linear"
RATE = ("operations_per_s", "GOP/s", 1e-9)
RATE_ON_GPU = ("operations_per_s", "TOP/s", 1e-12)
#: rows are 8-bit codes: half a step of 255 is 0.2 % of a row's range
TOLERANCE = {"float32": 3e-2, "bfloat16": 5e-2, "float16": 3e-2}


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
    for rows in (1, 16, 128, 512, 2048, 8192)
}
#: 8192 rows are for a GPU
DEFAULT = tuple(name for name in WORKLOADS if not name.endswith("-m8192"))
CUBLAS = "cuBLAS int8"
#: filbert's: bits, inputs of a group
OURS = {
    "filbert 2 bits": (2, None),
    "filbert 3 bits": (3, None),
    "filbert 4 bits": (4, None),
    "filbert 4 bits, groups of 64": (4, 64),
    "filbert 4 bits, groups of 128": (4, 128),
    "filbert 6 bits": (6, None),
    "filbert 8 bits": (8, None),
}


def _session(graph: Any) -> Any:
    import onnxruntime as ort
    from onnx import helper

    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads spin during a run, and not on into the next contestant's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class _Layer:
    """One layer in every form it is run in."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.ops, self.size, self.dtype = compiled_filbert().ops, size, dtype
        self.on_gpu = on_gpu(device)
        self.x, self.weight = normal(size.rows, size.inputs), normal(size.outputs, size.inputs)
        self.bias = normal(size.outputs)

    def right_answer(self) -> Tensor:
        return self.x.double() @ self.weight.double().T + self.bias.double()

    def restored(self, used: Tensor) -> Callable[[Tensor], Tensor]:
        """What a result would be with the weight itself and not the one that was used."""
        lost = self.x.double() @ (self.weight.double() - used.double()).T
        return lambda y: y.double() + lost

    def linear(self) -> Contestant:
        x, weight, bias = (t.to(self.dtype) for t in (self.x, self.weight, self.bias))
        return Contestant(REFERENCE, lambda: F.linear(x, weight, bias), lambda y: y)

    def dense(self) -> Contestant:
        x, weight, bias = (t.to(self.dtype) for t in (self.x, self.weight, self.bias))
        packed = self.ops.pack_dense(weight)
        run = lambda: self.ops.linear_dense(x, packed, self.size.outputs, bias)  # noqa: E731
        return Contestant("filbert linear_dense", run, lambda y: y)

    def onednn(self) -> Contestant:
        """PyTorch's dynamic int8: a scale for each output, and one for all rows."""
        before = torch.backends.quantized.engine
        if "onednn" not in torch.backends.quantized.supported_engines:
            raise Unavailable("this torch has no oneDNN engine for int8")
        scale = self.weight.abs().amax(1) / 127
        weight = torch.quantize_per_channel(
            self.weight, scale, torch.zeros(self.size.outputs, dtype=torch.int64), 0, torch.qint8
        )
        torch.backends.quantized.engine = "onednn"
        try:
            packed = torch.ops.quantized.linear_prepack(weight, self.bias)
        finally:
            torch.backends.quantized.engine = before

        def run() -> Tensor:
            torch.backends.quantized.engine = "onednn"
            try:
                return torch.ops.quantized.linear_dynamic(self.x, packed)
            finally:
                torch.backends.quantized.engine = before

        return Contestant(
            "oneDNN dynamic int8", run, self.restored(weight.dequantize()),
            note="one scale for all rows",
        )  # fmt: skip

    def onednn_bfloat16(self) -> Contestant:
        """oneDNN's packed bfloat16 product; rows are turned into bfloat16 and results back."""
        from filbert.nn.dense.backends import OneDNN

        weight, bias = self.weight.bfloat16(), self.bias.bfloat16()
        if reason := OneDNN.why_not(weight, torch.bfloat16):
            raise Unavailable(reason)
        packed = OneDNN(weight, torch.bfloat16)
        return Contestant(
            "oneDNN bfloat16", lambda: packed.product(self.x.bfloat16(), bias, None).float(),
            self.restored(weight.float()),
        )  # fmt: skip

    def _ends(self) -> list[Any]:
        from onnx import TensorProto, helper

        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
            for name, width in (("x", self.size.inputs), ("y", self.size.outputs))
        ]

    def _contestant(self, name: str, graph: Any, used: Tensor) -> Contestant:
        session, given = _session(graph), {"x": self.x.numpy()}
        restore = self.restored(used)
        return Contestant(
            name, lambda: session.run(None, given)[0],
            lambda y: restore(torch.from_numpy(y) + self.bias), note="without the bias",
        )  # fmt: skip

    def onnxruntime(self) -> Contestant:
        """What quantize_dynamic makes with ``per_channel`` and ``reduce_range`` as its
        documentation advises without VNNI: DynamicQuantizeMatMul."""
        from onnx import helper, numpy_helper

        scale = self.weight.abs().amax(1) / 64
        codes = (self.weight / scale[:, None]).round().clamp(-64, 64)
        parts = [
            numpy_helper.from_array(codes.T.to(torch.int8).contiguous().numpy(), "w"),
            numpy_helper.from_array(scale.numpy(), "s"),
            numpy_helper.from_array(torch.zeros_like(scale).to(torch.int8).numpy(), "z"),
        ]
        node = helper.make_node(
            "DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"], domain="com.microsoft"
        )
        ends = self._ends()
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], parts)
        return self._contestant("onnxruntime dynamic int8", graph, codes * scale[:, None])

    def four_bits(self) -> Contestant:
        """onnxruntime's MatMulNBits with rows of int8 (accuracy level 4), blocks of 32."""
        from onnx import helper, numpy_helper

        n, k = self.size.outputs, self.size.inputs
        parts = self.weight.view(n, k // 32, 32)
        scale = parts.abs().amax(-1) / 7
        codes = (parts / scale[..., None]).round().clamp(-8, 7) + 8
        used = ((codes - 8) * scale[..., None]).view(n, k)
        codes = codes.to(torch.uint8)
        packed = codes[..., ::2] | codes[..., 1::2] << 4
        held = [
            numpy_helper.from_array(packed.contiguous().numpy(), "w"),
            numpy_helper.from_array(scale.flatten().contiguous().numpy(), "s"),
        ]
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4,
            block_size=32, accuracy_level=4,
        )  # fmt: skip
        ends = self._ends()
        graph = helper.make_graph([node], "linear", ends[:1], ends[1:], held)
        return self._contestant("onnxruntime MatMulNBits", graph, used)

    def cublas(self) -> Contestant:
        """Rows and weight are codes before the clock starts, and the sums stay int32: a layer that
        is made of it takes longer."""
        if self.size.rows <= 16:
            raise Unavailable("torch._int_mm needs more than 16 rows")
        scales = [t.abs().amax(1, keepdim=True) / 127 for t in (self.x, self.weight)]
        x, weight = (
            (t / scale).round().to(torch.int8)
            for t, scale in zip((self.x, self.weight), scales, strict=True)
        )
        used = weight * scales[1]
        restore = self.restored(used)
        return Contestant(
            CUBLAS, lambda: torch._int_mm(x, weight.t()),
            lambda y: restore(y * scales[0].double() * scales[1].double().t() + self.bias),
            note="codes given, sums not scaled",
        )  # fmt: skip

    def ours(self, name: str) -> Contestant:
        from filbert.compress.quantize import round_to_nearest
        from filbert.nn import LinearGrouped

        bits, group = OURS[name]
        weight = round_to_nearest(self.weight.cpu(), bits, group)
        operands = LinearGrouped([weight], self.bias.cpu()).to(self.x.device).operands()
        x = self.x.to(self.dtype)
        return Contestant(
            name, lambda: self.ops.linear_grouped(x, **operands),
            self.restored(weight.dequantize().to(x.device)),
        )  # fmt: skip

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        found: dict[str, Callable[[], Contestant]] = {REFERENCE: self.linear}
        if self.on_gpu:
            found[CUBLAS] = self.cublas
        else:
            found["filbert linear_dense"] = self.dense
        if self.dtype == torch.float32 and not self.on_gpu:
            found |= {
                "oneDNN dynamic int8": self.onednn,
                "oneDNN bfloat16": self.onednn_bfloat16,
                "onnxruntime dynamic int8": self.onnxruntime,
                "onnxruntime MatMulNBits": self.four_bits,
            }
        return found | {name: (lambda name=name: self.ours(name)) for name in OURS}  # type: ignore[misc]


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    """Each multiply-add once, each weight and row once."""
    operations = 2.0 * size.rows * size.inputs * size.outputs
    kind, bits = (kind_of(dtype), 8 * dtype.itemsize)
    if "int8" in who or "MatMulNBits" in who or who in OURS or not who:
        kind = "int8"
        bits = OURS[who][0] if who in OURS else 4 if "MatMulNBits" in who else 8
    elif "bfloat16" in who:
        kind, bits = kind_of(torch.bfloat16), 16
    rows = size.rows * (size.inputs + size.outputs) * dtype.itemsize
    return Work({kind: operations}, rows + size.inputs * size.outputs * bits // 8)


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    return sweep(
        options, WORKLOADS, _Layer, work,
        figure=RATE[0], reference=lambda _: REFERENCE, tolerance=TOLERANCE, budget_s=6.0,
        default=("*",) if on_gpu(options.device) else DEFAULT,
    )  # fmt: skip
