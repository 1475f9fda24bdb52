"""What can run a dense linear layer, as objects that say whether they can, and what they are.

:data:`BACKENDS` is the choice, best first: the first that has no reason against it is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import _load, ops

__all__ = ["BACKENDS", "GELU_FORMS", "Backend", "FLinear", "FilbertGemm", "Norm", "OneDNN"]

#: our name of an activation -> the name torch gives that form of GELU
GELU_FORMS = {"gelu": "none", "gelu_tanh": "tanh"}


class Norm(Protocol):
    """A LayerNorm that follows a linear layer, such as :class:`filbert.nn.RowNorm`: ``weight`` and
    ``bias`` ``[N]``, and ``eps``."""

    weight: Any
    bias: Any
    eps: float


class Backend(ABC):
    """A dense weight as one library wants it, and the product with it.

    Args:
        dense: ``[N, K]``.
        rows: dtype of the rows it is multiplied with.
    """

    #: what :attr:`filbert.nn.PackedLinear.backend` says
    name: str
    #: in a report
    kernel: str
    #: why it is chosen where it can be
    reason: str
    #: whether a row's bits depend on that row alone, whatever the others
    batch_invariant = False

    @staticmethod
    @abstractmethod
    def why_not(dense: Tensor, rows: torch.dtype) -> str | None:
        """Why it cannot hold ``dense`` and multiply rows of dtype ``rows``, or None."""

    @abstractmethod
    def __init__(self, dense: Tensor, rows: torch.dtype) -> None: ...

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        """``act(x @ W.T + bias)`` of rows ``[T, K]``."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight ``[N, K]`` in the dtype it came in, bit for bit."""

    def shared(self) -> Tensor | None:
        """The weight ``[N, K]`` where it lies as it came, or None."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        weight = self.dense()
        return weight.numel() * weight.element_size()

    def run(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        norm: Norm | None,
    ) -> Tensor:
        """:meth:`product` ``+ residual``, and LayerNorm of that."""
        if norm is None:
            y = self.product(x, bias, activation)
            return y if residual is None else y.add_(residual)
        late = bias if activation is None else None  # added in float32, with the residual
        y = self.product(x, None if activation is None else bias, activation)
        return ops.norm_residual_(y, late, residual, norm.weight, norm.bias, norm.eps)


class FilbertGemm(Backend):
    """:func:`filbert.linear_dense`: one order of sums, whatever the batch."""

    name = "filbert"
    reason = "weight packed once, in its own dtype; a row's bits depend on the row alone"
    batch_invariant = True

    @staticmethod
    def why_not(dense: Tensor, rows: torch.dtype) -> str | None:
        """See :meth:`Backend.why_not`."""
        if dense.device.type != "cpu":
            return f"weights on {dense.device.type}, where PyTorch's library has its own layouts"
        if not _load.have_ops():
            return "filbert's operators are not compiled here"
        if rows not in (torch.float32, torch.bfloat16) or rows.itemsize > 2 > dense.element_size():
            return f"linear_dense has float32 and bfloat16 rows, not {rows}"
        return None

    def __init__(self, dense: Tensor, rows: torch.dtype) -> None:
        self.outputs, self.inputs = dense.shape
        self.packed = ops.pack_dense(dense)
        wide = "" if dense.dtype == rows else f", {str(dense.dtype).removeprefix('torch.')} weight"
        self.kernel = "filbert linear_dense" + wide

    def product(self, x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        """See :meth:`Backend.product`."""
        return self.run(x, bias, activation, None, None)

    def run(
        self,
        x: Tensor,
        bias: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
        norm: Norm | None,
    ) -> Tensor:
        """See :meth:`Backend.run`."""
        weight, shift, eps = (None, None, 0.0)
        if norm is not None:
            weight, shift, eps = norm.weight, norm.bias, norm.eps
        return torch.ops.filbert.linear_dense.default(
            x, self.packed, self.outputs, bias, activation or "none", residual, weight, shift, eps
        )

    def dense(self) -> Tensor:
        """See :meth:`Backend.dense`."""
        return ops.unpack_dense(self.packed, self.outputs, self.inputs)

    @property
    def nbytes(self) -> int:
        """See :attr:`Backend.nbytes`."""
        return self.outputs * self.inputs * self.packed.element_size()


@cache
def why_no_onednn(dtype: torch.dtype) -> str | None:
    """Why packed oneDNN weights cannot be used for ``dtype``, or None: tried once per process."""
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN packs float32 and bfloat16, not {dtype}"
    shape = torch.arange(24 * 16, dtype=torch.float32, device="cpu")
    weight = torch.sin(shape).view(24, 16).to(dtype)
    rows = torch.cos(shape[: 3 * 16]).view(3, 16).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
        got = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
        act = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "gelu", [], "tanh")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"oneDNN cannot pack {dtype} weights here ({str(error).splitlines()[0]})"
    exact = rows.double() @ weight.double().T
    near = 1e-5 if dtype == torch.float32 else 5e-2
    for answer, expected in ((got, exact), (act, F.gelu(exact, approximate="tanh"))):
        if not torch.allclose(answer.double(), expected, rtol=near, atol=near):
            return f"oneDNN's packed {dtype} product failed its self-check"
    return None


@cache
def _gelu_post_op() -> bool:
    """Whether oneDNN's GELU post-op is worth using: without AVX-512 it costs more than the
    pass it saves."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits."""
    view = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(view), b.view(view))


class OneDNN(Backend):
    """oneDNN's own layout, through PyTorch. A 16-bit weight is widened where rows are float32."""

    name = "onednn"
    reason = "weight packed once"

    @staticmethod
    def why_not(dense: Tensor, rows: torch.dtype) -> str | None:
        """See :meth:`Backend.why_not`."""
        if dense.device.type != "cpu":
            return f"weights on {dense.device.type}, where PyTorch's library has its own layouts"
        if dense.numel() == 0:
            return "an empty weight"
        if (why := why_no_onednn(rows)) is not None:
            return why
        wide = dense.to(rows)
        packed = torch.ops.mkldnn._reorder_linear_weight(wide, 1024)
        if not same_bits(packed.to_dense(), wide):
            return "oneDNN did not give the packed weight back unchanged"
        return None

    def __init__(self, dense: Tensor, rows: torch.dtype) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(dense.to(rows), 1024)
        self.dtype = dense.dtype
        self.kernel = "oneDNN packed" + (" f32" if dense.dtype != rows else "")
        if dense.dtype != rows:
            self.reason = f"weight packed once; {dense.dtype} widened to {rows}"

    def product(self, x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        """See :meth:`Backend.product`."""
        linear = torch.ops.mkldnn._linear_pointwise.default
        if activation is None:
            return linear(x, self.packed, bias, "none", [], "")
        form = GELU_FORMS[activation]
        if _gelu_post_op():
            return linear(x, self.packed, bias, "gelu", [], form)
        return _gelu(linear(x, self.packed, None, "none", [], ""), bias, form)

    def dense(self) -> Tensor:
        """See :meth:`Backend.dense`."""
        return self.packed.to_dense().to(self.dtype)

    @property
    def nbytes(self) -> int:
        """See :attr:`Backend.nbytes`."""
        return self.packed.numel() * self.packed.element_size()


class FLinear(Backend):
    """``F.linear`` on the dense weight: cuBLASLt on a GPU, and what is left on a CPU."""

    name = "linear"
    reason = "nothing else can hold this weight"

    @staticmethod
    def why_not(dense: Tensor, rows: torch.dtype) -> str | None:
        """See :meth:`Backend.why_not`."""
        return None

    def __init__(self, dense: Tensor, rows: torch.dtype) -> None:
        self.weight, self.dtype = dense.to(rows), dense.dtype
        self.kernel = "cuBLAS by F.linear" if dense.is_cuda else "F.linear"

    def product(self, x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        """See :meth:`Backend.product`."""
        if activation is None:
            return F.linear(x, self.weight, bias)
        return _gelu(F.linear(x, self.weight), bias, GELU_FORMS[activation])

    def dense(self) -> Tensor:
        """See :meth:`Backend.dense`."""
        return self.weight.to(self.dtype)

    def shared(self) -> Tensor | None:
        """See :meth:`Backend.shared`."""
        return self.weight if self.weight.dtype == self.dtype else None

    @property
    def nbytes(self) -> int:
        """See :attr:`Backend.nbytes`."""
        return self.weight.numel() * self.weight.element_size()


def _gelu(y: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """GELU(y + bias), over ``y`` where our operator is there, which is one pass."""
    if _load.have_ops():
        return ops.bias_gelu_(y, bias, form)
    return F.gelu(y if bias is None else y + bias, approximate=form)


#: best first
BACKENDS: tuple[type[Backend], ...] = (FilbertGemm, OneDNN, FLinear)


def choose(dense: Tensor, rows: torch.dtype) -> tuple[Backend, str]:
    """The best backend for ``dense`` ``[N, K]`` and rows of dtype ``rows``, and why."""
    against: list[str] = []
    for kind in BACKENDS:
        if (why := kind.why_not(dense, rows)) is None:
            backend = kind(dense, rows)
            reason = backend.reason if kind is not FLinear or not against else against[-1]
            return backend, reason
        against.append(why)
    raise AssertionError("F.linear holds every weight")
