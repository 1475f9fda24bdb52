"""Linear layers whose weight is a product of two thin factors.

Paper: FlashSVD, arXiv 2508.01506.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ..dense.linear import row_dtype
from ..inference import check_no_gradient
from .factors import Factors

__all__ = ["LinearLowRank"]

_ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")


class LinearLowRank(nn.Module):
    """``activation(x @ (b @ a).T + bias)`` on a CPU, as two products. For inference only.

    Args:
        factors: of the weight ``[N, K]``, or of several over the same inputs, one below the other.
        bias: ``[N]``, or None; converted to ``compute_dtype``.
        activation: None, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        sizes: outputs of each weight; all are one if not given.
        compute_dtype: of rows, as :class:`filbert.nn.PackedLinear` takes it.

    Attributes:
        a, b: of :func:`filbert.pack_dense`.
        rank: R.
        rank_in_use: how many of the factors' directions are used, R or less.

    Raises:
        ValueError: shapes, dtypes, a device or an activation that do not fit.
    """

    takes_bits = False
    takes_codes = False
    keeps_weight = True
    batch_invariant = True
    #: how many blocks of rows go through it at a time, see :mod:`filbert.nn.row_blocks`
    row_blocks = 1
    #: what applies a LayerNorm after it
    norm_kernel = "in linear_lowrank"
    reason = "weight of low rank, two products; a row's bits depend on the row alone"
    a: Tensor
    b: Tensor
    bias: Tensor | None

    def __init__(
        self,
        factors: Factors,
        bias: Tensor | None = None,
        *,
        activation: str | None = None,
        sizes: Sequence[int] | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}, need one of {_ACTIVATIONS}")
        if factors.a.device.type != "cpu":
            raise ValueError(f"factors: got {factors.a.device}, need cpu")
        self.rank, self.in_features = factors.a.shape
        self._rank_in_use = self.rank
        self.out_features = factors.b.shape[0]
        self.sizes = tuple(sizes or (self.out_features,))
        if sum(self.sizes) != self.out_features:
            raise ValueError(f"sizes: got {self.sizes}, need {self.out_features} together")
        if bias is not None and bias.shape != (self.out_features,):
            raise ValueError(f"bias: got {tuple(bias.shape)}, need [{self.out_features}]")
        self.activation, self.weight_dtype, self.trainable = activation, factors.a.dtype, False
        self.compute_dtype = compute_dtype or row_dtype(factors.a.dtype, factors.a.device)
        self.register_buffer("a", ops.pack_dense(factors.a.detach()))
        self.register_buffer("b", ops.pack_dense(factors.b.detach()))
        held = None if bias is None else bias.detach().to(self.compute_dtype).contiguous()
        self.register_buffer("bias", held)

    @property
    def rank_in_use(self) -> int:
        """See the class. Factors that :func:`filbert.factorize` made are in the order of their
        worth, so that the first of them are the best of a smaller rank; nothing is packed again."""
        return self._rank_in_use

    @rank_in_use.setter
    def rank_in_use(self, rank: int) -> None:
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank_in_use: got {rank}, need 1 to {self.rank}")
        self._rank_in_use = rank

    @property
    def factors(self) -> Factors:
        """The factors as they came."""
        return Factors(
            ops.unpack_dense(self.a, self.rank, self.in_features),
            ops.unpack_dense(self.b, self.out_features, self.rank),
        )

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        activation = "" if self.activation is None else f" + {self.activation.partition('_')[0]}"
        of = "" if self.rank_in_use == self.rank else f" of {self.rank}"
        return f"linear_lowrank, rank {self.rank_in_use}{of}{activation}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of both factors."""
        return sum(t.numel() * t.element_size() for t in (self.a, self.b))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are held."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def forward(self, x: Tensor, *, residual: Tensor | None = None, norm: Any = None) -> Tensor:
        """``act(x @ (b @ a).T + bias) + residual``, and LayerNorm of that.

        Args:
            x: ``[T, K]`` in ``compute_dtype``.
            residual: ``[T, N]``, likewise, or None.
            norm: LayerNorm over N applied last, ``weight``, ``bias`` and ``eps``; or None.

        Returns:
            ``[T, N]`` in ``compute_dtype``.

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit, or a gradient is asked for.
        """
        check_no_gradient("LinearLowRank", x=x)
        after = () if norm is None else (norm.weight, norm.bias, norm.eps)
        return ops.linear_lowrank(
            x, self.a, self.b, self.rank_in_use, self.out_features, self.bias,
            self.activation or "none", residual, *after,
        )  # fmt: skip

    def dense_weights(self) -> list[Tensor]:
        """What the factors stand for, each weight with storage of its own."""
        whole = self.factors
        product = Factors(whole.a.float(), whole.b.float()).weight.to(self.weight_dtype)
        return [part.clone() for part in product.split(self.sizes)]

    def shared_weights(self) -> list[Tensor] | None:
        """None: the product is nowhere."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearLowRank:
        if fn(bare := torch.empty(0, dtype=self.compute_dtype)) is not bare:
            raise RuntimeError(
                f"LinearLowRank: its factors are packed for {self.compute_dtype} on cpu and cannot "
                "be cast or moved; try casting the model before it is factorized"
            )
        return self

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` needs to make an equal layer with tensors yet to be loaded."""
        return {
            "kind": "lowrank", "in_features": self.in_features, "sizes": list(self.sizes),
            "rank": self.rank, "bias": self.bias is not None, "activation": self.activation,
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearLowRank:
        """The inverse of :meth:`config`."""
        dtype, outputs = getattr(torch, config["weight_dtype"]), sum(config["sizes"])
        shapes = (config["rank"], config["in_features"]), (outputs, config["rank"])
        return cls(
            Factors(*(torch.zeros(shape, dtype=dtype) for shape in shapes)),
            torch.zeros(outputs) if config["bias"] else None, activation=config["activation"],
            sizes=config["sizes"], compute_dtype=getattr(torch, config["compute_dtype"]),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}, activation={self.activation}"
        )
