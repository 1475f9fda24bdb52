"""Linear layers whose weight is laid out once, for the fastest GEMM this machine has.

oneDNN is the well-kept library for dense GEMMs on a CPU, and PyTorch carries it. ``F.linear`` lets
it re-lay the weight out on every call; packing the weight once saves that. Nothing here computes:
the module picks a backend at construction and says which, so that :func:`filbert.report` can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _load, ops
from ..refusals import has_tangent, refuse_gradient
from .dense_weights import DenseWeights

__all__ = ["PackedLinear", "gelu_kind", "row_dtype"]

#: our name of an activation -> the name torch gives that form of GELU
GELU_FORMS = {"gelu": "none", "gelu_tanh": "tanh"}


@cache
def _bf16_gemm() -> bool:
    """Whether oneDNN has a bf16 GEMM on this CPU."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def row_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype the packed rows of a model of ``dtype`` are kept in between layers.

    A CPU without bf16 instructions multiplies bfloat16 matrices several times slower than float32
    ones, so there a bfloat16 model runs on weights widened to float32, which is exact.
    """
    if dtype == torch.bfloat16 and device.type == "cpu" and not _bf16_gemm():
        return torch.float32
    return dtype


@cache
def _gelu_post_op() -> bool:
    """Whether oneDNN's GELU post-op is worth using: without AVX-512 it costs more than the
    pass it saves."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@cache
def _why_no_onednn(dtype: torch.dtype) -> str | None:
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


def _same_bits(a: Tensor, b: Tensor) -> bool:
    view = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(view), b.view(view))


def gelu_kind(activation: Callable[[Tensor], Tensor]) -> str | None:
    """``"gelu"`` or ``"gelu_tanh"`` where ``activation`` is that function, else None.

    Decided by its values and not by its name, because there are a dozen classes for the two.
    """
    ends = torch.tensor([-1e4, -50.0, 50.0, 1e4], device="cpu")
    x = torch.cat([torch.linspace(-8, 8, 801, device="cpu"), ends])
    try:
        with torch.no_grad():
            y = activation(x.clone())
    except Exception:  # an activation may want anything; one that fails here is no GELU
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name, form in GELU_FORMS.items():
        if torch.allclose(y, F.gelu(x, approximate=form), rtol=2e-6, atol=2e-6):
            return name
    return None


class PackedLinear(nn.Module):
    """``activation(x @ weight.T + bias)`` with the weight packed once.

    Several weights are concatenated over their output features, so that Q, K and V are one GEMM.

    Args:
        weights: one or several ``[out_i, in]``, one dtype and device.
        bias: ``[sum(out_i)]`` or None; converted to ``compute_dtype``.
        activation: None, ``"gelu"`` (erf) or ``"gelu_tanh"``.
        compute_dtype: dtype of rows and packed weight; :func:`row_dtype` if not given. It must hold
            the weight exactly: the weight's own dtype, or float32 for a bfloat16 weight.

    Attributes:
        backend: ``"onednn"`` (packed), ``"onednn-f32"`` (packed, bfloat16 weight widened to
            float32) or ``"linear"`` (``F.linear``).
        reason: why it is that one, in words.
        trainable: a weight required a gradient when it was packed; calls then raise while gradients
            are recorded.

    Raises:
        ValueError: shapes, dtypes or an activation that do not fit.
    """

    bias: Tensor | None

    def __init__(
        self,
        weights: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation is not None and activation not in GELU_FORMS:
            raise ValueError(
                f"activation: got {activation!r}, need None or one of {sorted(GELU_FORMS)}; "
                "apply any other function to the result"
            )
        first = weights[0]
        self.in_features = first.shape[1]
        self.sizes = tuple(w.shape[0] for w in weights)
        self.out_features = sum(self.sizes)
        self.weight_dtype = first.dtype
        self.trainable = any(t.requires_grad for t in (*weights, bias) if t is not None)
        self.activation = activation
        compute = compute_dtype or row_dtype(first.dtype, first.device)
        if compute != first.dtype and (first.dtype, compute) != (torch.bfloat16, torch.float32):
            raise ValueError(
                f"compute_dtype: got {compute} for a {first.dtype} weight, need {first.dtype}, or "
                "torch.float32 for a bfloat16 weight"
            )
        with torch.no_grad():
            dense = (
                first.detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
            )
            self.register_buffer(
                "bias",
                None if bias is None else bias.detach().to(compute).contiguous(),
                persistent=False,
            )
            self._choose(dense.to(compute).contiguous())

    @classmethod
    def from_linears(cls, *linears: nn.Linear, activation: str | None = None) -> PackedLinear:
        """From ``nn.Linear`` modules over one input; all of them have a bias, or none has."""
        biases = [linear.bias for linear in linears]
        if any(b is None for b in biases) and any(b is not None for b in biases):
            raise ValueError("linears: some have a bias and some have none, need all or none")
        bias = None if biases[0] is None else torch.cat(list[Tensor](biases))
        return cls([linear.weight for linear in linears], bias, activation=activation)

    def _choose(self, dense: Tensor) -> None:
        """Picks the backend, and lays ``dense`` ``[out, in]`` (in compute dtype) out for it."""
        self.compute_dtype = dense.dtype
        widened = dense.dtype != self.weight_dtype
        # No buffers: oneDNN's is an opaque tensor without storage, and the dense one may be shared
        # with the parameters it came from, which are counted as such.
        self.packed: Tensor | None = None
        self.weight: Tensor | None = dense
        if dense.device.type != "cpu":
            reason = f"weights on {dense.device.type}, where PyTorch's library has its own layouts"
        elif dense.numel() == 0:
            reason = "an empty weight"
        elif (why := _why_no_onednn(dense.dtype)) is not None:
            reason = why
        else:
            packed = torch.ops.mkldnn._reorder_linear_weight(dense, 1024)
            if _same_bits(packed.to_dense(), dense):
                self.packed, self.weight, reason = packed, None, "weight packed once"
            else:
                reason = "oneDNN did not give the packed weight back unchanged"
        self.backend = "linear" if self.packed is None else "onednn-f32" if widened else "onednn"
        if widened:
            reason += f"; {self.weight_dtype} widened to {dense.dtype}, this CPU has no bf16 GEMM"
        self.reason = reason
        # What the GEMM itself adds and applies; the rest is one pass over its result.
        self._post = ("none", "")
        self._after: str | None = None
        if self.activation is not None:
            form = GELU_FORMS[self.activation]
            if self.packed is not None and _gelu_post_op():
                self._post = ("gelu", form)
            else:
                self._after = form

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        words = {"linear": "F.linear", "onednn": "oneDNN packed", "onednn-f32": "oneDNN packed f32"}
        gelu = "" if self.activation is None else " + gelu"
        if self.weight is not None and self.weight.is_cuda:
            return "cuBLAS by F.linear" + gelu
        return words[self.backend] + gelu + (" post-op" if self._post[0] == "gelu" else "")

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias as they are held."""
        size = self.compute_dtype.itemsize
        biases = 0 if self.bias is None else self.out_features
        return size * (self.in_features * self.out_features + biases)

    def dense_weight(self) -> Tensor:
        """``[out_features, in_features]`` in the dtype it came in, bit for bit."""
        return self._dense().to(self.weight_dtype)

    def _dense(self) -> Tensor:
        """The weight ``[out, in]`` in ``compute_dtype``, wherever it is held."""
        return cast(Tensor, self.weight) if self.packed is None else self.packed.to_dense()

    def dense_weights(self) -> list[Tensor]:
        """The weights this module was made of, each with storage of its own."""
        dense = self.dense_weight()
        own = len(self.sizes) == 1 and dense is not self.weight
        return [dense] if own else [part.clone() for part in dense.split(self.sizes)]

    def shared_weights(self) -> list[Tensor] | None:
        """The weights this module was made of as views of what it computes with, or None where it
        holds them in another layout or dtype."""
        if self.weight is None or self.compute_dtype != self.weight_dtype:
            return None
        return list(self.weight.split(self.sizes))

    def forward(self, x: Tensor) -> Tensor:
        """``[T, in_features]`` to ``[T, out_features]``, both in ``compute_dtype``."""
        if x.requires_grad or has_tangent(x):
            refuse_gradient("PackedLinear", [("x", x)])
        if self.trainable and torch.is_grad_enabled():
            raise RuntimeError(
                "PackedLinear is inference only: a weight that was packed requires a gradient, and "
                "the packed one has none to give; try 'with torch.inference_mode():' (or "
                "torch.no_grad()) around the call, or requires_grad_(False) before packing"
            )
        after = self._after
        # Without the compiled operators, torch's own GELU is the better second pass.
        fused_bias = after is not None and _load.have_ops()
        bias = None if fused_bias else self.bias
        if self.packed is not None:
            attr, form = self._post
            y = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, bias, attr, [], form)
        else:
            y = F.linear(x, cast(Tensor, self.weight), bias)
        if after is None:
            return y
        return ops.bias_gelu_(y, self.bias, after) if fused_bias else F.gelu(y, approximate=after)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        device = torch.device("cpu") if self.weight is None else self.weight.device
        bare = torch.empty(0, dtype=self.compute_dtype, device=device)
        if fn(bare) is not bare:
            raise RuntimeError(
                f"PackedLinear: its weight is packed for {self.compute_dtype} on {bare.device} and "
                "cannot be cast or moved; try casting the model and calling filbert.convert again"
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # oneDNN's layout belongs to this machine and this torch: only the dense weight travels.
        state["packed"], state["weight"] = None, DenseWeights([self._dense()])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        (dense,) = state.pop("weight")
        super().__setstate__(state)
        self._choose(dense)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}, kernel={self.kernel!r}"
        )
