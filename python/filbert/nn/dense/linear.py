"""Linear layers whose weight is laid out once, for the best GEMM there is for it.

Nothing here computes: the module picks a backend at construction, see
:mod:`filbert.nn.dense.backends`, and says which, so that :func:`filbert.report` can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import _load
from ...refusals import has_tangent, refuse_gradient
from .backends import BACKENDS, GELU_FORMS, Norm, choose
from .weights import DenseWeights

__all__ = ["Choices", "PackedLinear", "choices", "gelu_kind", "row_dtype"]


@cache
def _bf16_gemm() -> bool:
    """Whether bfloat16 matrices are multiplied as such on this CPU, and not several times slower
    than float32 ones."""
    if _load.have_ops() and _load.C is not None:
        return bool(_load.C.isa_details()["bf16_pairs"])
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def row_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype the packed rows of a model of ``dtype`` are kept in between layers.

    A CPU without bfloat16 instructions multiplies bfloat16 matrices several times slower than
    float32 ones, and hardly any has float16 instructions. There rows are float32, and a weight is
    widened as it is multiplied, which is exact.
    """
    if device.type == "cpu" and dtype == torch.float16:
        return torch.float32
    if dtype == torch.bfloat16 and device.type == "cpu" and not _bf16_gemm():
        return torch.float32
    return dtype


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
        compute_dtype: dtype of rows; :func:`row_dtype` if not given. It must hold the weight
            exactly: the weight's own dtype, or float32 for a 16-bit weight.

    Attributes:
        backend: ``"filbert"`` (:func:`filbert.linear_dense`), ``"onednn"`` (packed by oneDNN) or
            ``"linear"`` (``F.linear``).
        reason: why it is that one, in words.
        trainable: a weight required a gradient when it was packed; calls then raise while gradients
            are recorded.

    Raises:
        ValueError: shapes, dtypes or an activation that do not fit.
    """

    takes_bits = False
    #: rows of 8-bit codes may be given, and be asked for
    takes_codes = False
    #: :meth:`dense_weights` gives back what was packed
    keeps_weight = True
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
        half = first.dtype in (torch.float16, torch.bfloat16)
        if compute != first.dtype and not (half and compute == torch.float32):
            raise ValueError(
                f"compute_dtype: got {compute} for a {first.dtype} weight, need {first.dtype}, or "
                "torch.float32 for a 16-bit weight"
            )
        self.compute_dtype = compute
        with torch.no_grad():
            dense = (
                first.detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
            )
            self.register_buffer(
                "bias",
                None if bias is None else bias.detach().to(compute).contiguous(),
            )
            self._choose(dense.contiguous())

    @classmethod
    def from_linears(cls, *linears: nn.Linear, activation: str | None = None) -> PackedLinear:
        """From ``nn.Linear`` modules over one input; all of them have a bias, or none has."""
        biases = [linear.bias for linear in linears]
        if any(b is None for b in biases) and any(b is not None for b in biases):
            raise ValueError("linears: some have a bias and some have none, need all or none")
        bias = None if biases[0] is None else torch.cat(list[Tensor](biases))
        return cls([linear.weight for linear in linears], bias, activation=activation)

    def _choose(self, dense: Tensor) -> None:
        """Picks the backend, which lays ``dense`` ``[out, in]`` out for itself."""
        # No buffers: a backend's weight may be opaque, and a dense one may be shared with the
        # parameters it came from, which are counted as such.
        self._device = dense.device
        self._backend, self.reason = choose(dense, self.compute_dtype)

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self._backend.name

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's bits depend on that row alone."""
        return self._backend.batch_invariant

    @property
    def row_blocks(self) -> int:
        """How many blocks of :func:`~filbert.nn.row_blocks.block_size` should go through it at a
        time; 0 for all rows."""
        return 1 if self._device.type == "cpu" else 0

    @property
    def norm_kernel(self) -> str:
        """What applies a LayerNorm after it."""
        return "in linear_dense" if self.batch_invariant else "norm_residual"

    @property
    def weight(self) -> Tensor | None:
        """The dense weight ``[out, in]`` where the backend computes with it as it came, or None."""
        return self._backend.shared()

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        return self._backend.kernel + ("" if self.activation is None else " + gelu")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight alone."""
        return self._backend.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias as they are held."""
        biases = 0 if self.bias is None else self.out_features * self.compute_dtype.itemsize
        return self._backend.nbytes + biases

    def config(self) -> dict[str, Any]:
        """What tells this layer from another, but for its numbers."""
        return {
            "kind": "dense", "in_features": self.in_features, "sizes": list(self.sizes),
            "bias": self.bias is not None, "activation": self.activation,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedLinear:
        """The inverse of :meth:`config`, with tensors yet to be loaded."""
        dtype = getattr(torch, config["weight_dtype"])
        weights = [torch.zeros(n, config["in_features"], dtype=dtype) for n in config["sizes"]]
        bias = torch.zeros(sum(config["sizes"])) if config["bias"] else None
        return cls(
            weights, bias, activation=config["activation"],
            compute_dtype=getattr(torch, config["compute_dtype"]),
        )  # fmt: skip

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The bias, and the dense weight: a layout belongs to this machine and this torch."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense_weight()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        rest = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        dense = state_dict.get(key)
        if dense is None:
            missing_keys.append(key)
        elif dense.shape != (self.out_features, self.in_features):
            need = [self.out_features, self.in_features]
            error_msgs.append(f"{key}: got shape {list(dense.shape)}, need {need}")
        else:
            with torch.no_grad():
                self._choose(dense.detach().to(self.weight_dtype).contiguous())

    def dense_weight(self) -> Tensor:
        """``[out_features, in_features]`` in the dtype it came in, bit for bit."""
        return self._backend.dense()

    def dense_weights(self) -> list[Tensor]:
        """The weights this module was made of, each with storage of its own."""
        dense = self.dense_weight()
        own = len(self.sizes) == 1 and dense is not self.weight
        return [dense] if own else [part.clone() for part in dense.split(self.sizes)]

    def shared_weights(self) -> list[Tensor] | None:
        """The weights this module was made of as views of what it computes with, or None where it
        holds them in another layout or dtype."""
        shared = self.weight
        return None if shared is None else list(shared.split(self.sizes))

    def forward(
        self, x: Tensor, *, residual: Tensor | None = None, norm: Norm | None = None
    ) -> Tensor:
        """``act(x @ W.T + bias) + residual``, and LayerNorm of that where ``norm`` is given.

        Args:
            x: ``[T, in_features]`` in ``compute_dtype``.
            residual: ``[T, out_features]``, likewise.
            norm: weight and bias ``[out_features]``, and eps.

        Returns:
            ``[T, out_features]`` in ``compute_dtype``.
        """
        if x.requires_grad or has_tangent(x):
            refuse_gradient("PackedLinear", [("x", x)])
        if self.trainable and torch.is_grad_enabled():
            raise RuntimeError(
                "PackedLinear is inference only: a weight that was packed requires a gradient, and "
                "the packed one has none to give; try 'with torch.inference_mode():' (or "
                "torch.no_grad()) around the call, or requires_grad_(False) before packing"
            )
        return self._backend.run(x, self.bias, self.activation, residual, norm)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        bare = torch.empty(0, dtype=self.compute_dtype, device=self._device)
        if fn(bare) is not bare:
            raise RuntimeError(
                f"PackedLinear: its weight is packed for {self.compute_dtype} on {bare.device} and "
                "cannot be cast or moved; try casting the model and calling filbert.convert again"
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        # A backend's layout belongs to this machine and this torch: only the dense weight travels.
        del state["_backend"]
        state["dense"] = DenseWeights([self.dense_weight()])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        (dense,) = state.pop("dense")
        super().__setstate__(state)
        self._choose(dense)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation}, kernel={self.kernel!r}"
        )


class Choices(dict[str, str]):
    """Result of :func:`choices`: a dict that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{weight:<{width}}  {chosen}" for weight, chosen in self.items())


def choices() -> Choices:
    """What runs a dense layer on this CPU, and why, for a weight of each dtype.

    The choice goes by dtypes and by what is built and loaded, and not by the shape of a weight or
    the number of rows: the same library for any batch is what keeps a text's bits the same in all
    of them.

    Returns:
        ``"float32"`` and so on to the rows' dtype, the kernel with its instruction set, the reason
        it is taken, and what was passed over before it and why.
    """
    found = Choices()
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight, rows = torch.zeros(16, 16, dtype=dtype), row_dtype(dtype, cpu)
        backend, reason = choose(weight, rows)
        against = [
            f"not {kind.name}: {why}"
            for kind in BACKENDS[: BACKENDS.index(type(backend))]
            if (why := kind.why_not(weight, rows)) is not None
        ]
        isa = f", {_load.isa()}" if backend.name == "filbert" else ""
        name = str(rows).removeprefix("torch.")
        parts = [f"{name} rows: {backend.kernel}{isa}", reason, *against]
        found[str(dtype).removeprefix("torch.")] = "; ".join(parts)
    return found
