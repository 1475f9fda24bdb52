"""Linear layers whose weight is a few bits: rows of numbers or of 8-bit codes in and out.

Paper: Q-BERT, arXiv 1909.05840.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...packed.codes import QuantizedRows
from ..inference import check_no_gradient
from .weight import GroupedWeight

__all__ = ["LinearGrouped"]

_ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")
_STORED = ("packed", "scale", "multiplier", "zero")


class LinearGrouped(nn.Module):
    """``activation(x @ weight.T + bias)`` for a weight of 2, 3, 4, 6 or 8 bits, see
    :func:`filbert.linear_grouped`. For inference only.

    Args:
        weights: one or several over the same inputs; their outputs follow each other.
        bias: ``[N]``, or None; kept in float32.
        activation: None, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        compute_dtype: of the result where rows are codes; rows of numbers have their own.
        weight_dtype: of the weights that these were made of, and that :meth:`dense_weights` gives.

    Attributes:
        packed, scale, multiplier, zero: of :class:`GroupedWeight`.
        totals, offset: derived from those, and no part of the state dict.
        bias: float32 ``[N]`` or None.

    Raises:
        ValueError: weights that do not go together, another shape or activation.
    """

    takes_bits = False
    #: rows of 8-bit codes may be given, and be asked for
    takes_codes = True
    keeps_weight = True
    batch_invariant = True
    #: what applies a LayerNorm after it
    norm_kernel = "in linear_grouped"
    reason = "weight of few bits, rows of 8-bit codes; sums are exact integers"
    packed: Tensor
    scale: Tensor
    multiplier: Tensor | None
    zero: Tensor | None
    totals: Tensor
    offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weights: Sequence[GroupedWeight],
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        compute_dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, need one of {_ACTIVATIONS}")
        weight = GroupedWeight.cat(weights)
        if bias is not None and bias.shape != (weight.outputs,):
            raise ValueError(f"bias: got {tuple(bias.shape)}, need [{weight.outputs}]")
        self.in_features, self.out_features = weight.inputs, weight.outputs
        self.sizes = tuple(w.outputs for w in weights)
        self.bits, self.groups = weight.bits, weight.groups
        self.activation = activation
        self.compute_dtype, self.weight_dtype = compute_dtype, weight_dtype
        self.trainable = False
        for name in _STORED:
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", None if bias is None else bias.detach().float().contiguous())
        self.register_buffer("totals", weight.totals(), persistent=False)
        self.register_buffer("offset", weight.offset(), persistent=False)
        self.register_load_state_dict_post_hook(_derive_after_load)

    @property
    def weight(self) -> GroupedWeight:
        """The weight as it is held."""
        return GroupedWeight(
            self.packed, self.bits, self.out_features, self.in_features, self.scale,
            self.multiplier, self.zero,
        )  # fmt: skip

    def derive(self) -> None:
        """Makes again what follows from the weight; done by itself after ``load_state_dict``."""
        weight = self.weight
        self.totals, self.offset = weight.totals(), weight.offset()

    @property
    def dtype_name(self) -> str:
        """``compute_dtype`` as operators take it."""
        return str(self.compute_dtype).removeprefix("torch.")

    @property
    def row_blocks(self) -> int:
        """See :class:`filbert.nn.dense.linear.PackedLinear`. Codes take a quarter of the bytes, and
        threads wait for each other less often."""
        return 4 if self.packed.device.type == "cpu" else 0

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        groups = "" if self.groups == 1 else f", groups of {self.in_features // self.groups}"
        offsets = "" if self.zero is None else ", offsets"
        activation = "" if self.activation is None else f" + {self.activation.partition('_')[0]}"
        return f"linear_grouped {self.bits} bits{groups}{offsets}{activation}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight, its scales included."""
        return self.weight.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are held."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def operands(self) -> dict[str, Any]:
        """What :func:`filbert.linear_grouped` takes beside rows and what follows the product."""
        return {
            # In the order of the operator's arguments, those of the rows left out.
            "weight": self.packed, "scale": self.scale, "totals": self.totals, "bits": self.bits,
            "multiplier": self.multiplier, "offset": self.offset, "bias": self.bias,
            "activation": self.activation or "none",
        }  # fmt: skip

    def _rows(self, x: Tensor | QuantizedRows) -> dict[str, Any]:
        if isinstance(x, QuantizedRows):
            return {"x": x.codes, "x_scale": x.scale, "x_zero": x.zero, "dtype": self.compute_dtype}
        check_no_gradient("LinearGrouped", x=x)
        return {"x": x}

    def forward(
        self, x: Tensor | QuantizedRows, *, residual: Tensor | None = None, norm: Any = None
    ) -> Tensor:
        """Numbers out.

        Args:
            x: rows ``[T, K]`` of numbers, float32 or bfloat16, on CUDA also float16; or codes.
            residual: ``[T, N]`` in the dtype of the result, added to it, or None.
            norm: LayerNorm over N applied last, ``weight``, ``bias`` and ``eps``; or None.

        Returns:
            ``[T, N]`` in the dtype of ``x``, or ``compute_dtype`` where rows are codes.

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit, or a gradient is asked for.
        """
        return ops.linear_grouped(
            **self._rows(x), **self.operands(), residual=residual, **_norm(norm)
        )

    def forward_codes(self, x: Tensor | QuantizedRows) -> QuantizedRows:
        """Codes out, for the next layer; no number of the result is stored.

        Args:
            x: as for :meth:`forward`.
        """
        _, *codes = ops.linear_grouped_codes(**self._rows(x), **self.operands())
        return QuantizedRows(*codes)

    def dense_weights(self) -> list[Tensor]:
        """The weights as numbers, each with storage of its own."""
        return [part.dequantize(self.weight_dtype) for part in self.weight.split(self.sizes)]

    def shared_weights(self) -> list[Tensor] | None:
        """None: numbers are nowhere."""
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> LinearGrouped:
        # Moves, but never casts: scales and bias are float32 by meaning.
        device = fn(torch.empty(0, device=self.scale.device)).device
        return super()._apply(lambda t: t.to(device), recurse)

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal layer with tensors yet to be loaded."""
        return {
            "kind": "grouped", "in_features": self.in_features, "sizes": list(self.sizes),
            "bits": self.bits, "groups": self.groups, "multiplier": self.multiplier is not None,
            "zero": self.zero is not None, "bias": self.bias is not None,
            "activation": self.activation,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearGrouped:
        """The inverse of :meth:`config`."""
        sizes, inputs, bits = config["sizes"], config["in_features"], config["bits"]

        def empty(outputs: int) -> GroupedWeight:
            groups = torch.zeros(outputs, config["groups"], dtype=torch.uint8)
            return GroupedWeight.from_codes(
                torch.zeros(outputs, inputs, dtype=torch.uint8), bits, torch.zeros(outputs),
                groups if config["multiplier"] else None, groups if config["zero"] else None,
            )  # fmt: skip

        return cls(
            [empty(size) for size in sizes], torch.zeros(sum(sizes)) if config["bias"] else None,
            activation=config["activation"], compute_dtype=getattr(torch, config["compute_dtype"]),
            weight_dtype=getattr(torch, config["weight_dtype"]),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kernel={self.kernel!r}"
        )


def _norm(norm: Any) -> dict[str, Any]:
    if norm is None:
        return {}
    return {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}


def _derive_after_load(layer: LinearGrouped, _: object) -> None:
    layer.derive()
