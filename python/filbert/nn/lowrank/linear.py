"""Linear layers whose weight is a product of two thin factors.

Paper: FlashSVD, arXiv 2508.01506.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ... import ops
from ..dense.backends import GELU_FORMS, FLinear
from ..dense.linear import row_dtype
from ..inference import check_no_gradient
from .factors import Factors

__all__ = ["LinearLowRank"]


#: rows from which on both products are one kernel on a GPU: 96 blocks of 64
FEWEST_ROWS = 6144


def on_gpu(device: torch.device) -> bool:
    """Whether factors there are held as the kernels for GPUs take them."""
    return device.type == "cuda"


def why_not_on_gpu(*linears: LinearLowRank) -> str | None:
    """Why layers that follow each other have no kernel of filbert's on a GPU, or None."""
    if linears[0].compute_dtype == torch.float32:
        return "rows are float32"
    sizes = [size for one in linears for size in (one.in_features, one.out_features)]
    if any(size % 8 for size in sizes):
        return f"sizes {sizes} are no multiples of 8"
    rank, most = max(one.rank_in_use for one in linears), ops.most_rank(linears[0].a.device)
    return None if rank <= most else f"rank {rank} is above {most}"


_ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")


class LinearLowRank(nn.Module):
    """``activation(x @ (b @ a).T + bias)`` as two products, by :func:`filbert.linear_lowrank`, and
    with few rows on a GPU by cuBLAS. For inference only.

    Args:
        factors: of the weight ``[N, K]``, or of several over the same inputs, one below the other.
        bias: ``[N]``, or None; converted to ``compute_dtype``.
        activation: None, ``"gelu"`` (erf) or ``"gelu_tanh"``; on a CPU ``"relu"`` or ``"silu"``
            too.
        sizes: outputs of each weight; all are one if not given.
        compute_dtype: of rows, as :class:`filbert.nn.PackedLinear` takes it.

    Attributes:
        a, b: of :func:`filbert.pack_dense`, on a GPU of :func:`filbert.pad_factor`.
        rank: R.
        rank_in_use: how many of the factors' directions are used, R or less.

    Raises:
        ValueError: shapes, dtypes or an activation that do not fit.
    """

    takes_bits = False
    takes_codes = False
    keeps_weight = True
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
        known = (None, *GELU_FORMS) if on_gpu(factors.a.device) else _ACTIVATIONS
        if activation not in known:
            raise ValueError(f"activation: got {activation!r}, need one of {known}")
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
        self.on_gpu = on_gpu(factors.a.device)
        pack = ops.pad_factor if self.on_gpu else ops.pack_dense
        self.register_buffer("a", pack(factors.a.detach()))
        self.register_buffer("b", pack(factors.b.detach()))
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
        if self.on_gpu:
            return Factors(*(t.contiguous() for t in self._used(self.rank)))
        return Factors(
            ops.unpack_dense(self.a, self.rank, self.in_features),
            ops.unpack_dense(self.b, self.out_features, self.rank),
        )

    def _used(self, rank: int) -> tuple[Tensor, Tensor]:
        """Both factors without what they are padded with, on a GPU."""
        return self.a[:rank, : self.in_features], self.b[: self.out_features, :rank]

    def _in_one(self, rows: int) -> bool:
        """Whether a GPU runs both products as one: with rows for all of its multiprocessors."""
        return rows >= FEWEST_ROWS and why_not_on_gpu(self) is None

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's bits depend on that row alone."""
        return not self.on_gpu

    @property
    def row_blocks(self) -> int:
        """How many blocks of rows go through it at a time, see :mod:`filbert.nn.row_blocks`."""
        return 0 if self.on_gpu else 1

    @property
    def norm_kernel(self) -> str:
        """What applies a LayerNorm after it."""
        return "norm_residual" if self.on_gpu else "in linear_lowrank"

    @property
    def reason(self) -> str:
        """Why this kernel, for :func:`filbert.report`."""
        if self.on_gpu:
            return "weight of low rank, two products"
        return "weight of low rank, two products; a row's bits depend on the row alone"

    @property
    def kernel(self) -> str:
        """The kernel in a few words, for :func:`filbert.report`."""
        activation = "" if self.activation is None else f" + {self.activation.partition('_')[0]}"
        of = "" if self.rank_in_use == self.rank else f" of {self.rank}"
        name = "cuBLAS twice, linear_lowrank for many rows" if self.on_gpu else "linear_lowrank"
        return f"{name}, rank {self.rank_in_use}{of}{activation}"

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
        if self.on_gpu and not self._in_one(len(x)):
            a, b = self._used(self.rank_in_use)
            second = FLinear(b, self.compute_dtype)
            return second.run(F.linear(x, a), self.bias, self.activation, residual, norm)
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
        bare = torch.empty(0, dtype=self.compute_dtype, device=self.a.device)
        if fn(bare) is not bare:
            raise RuntimeError(
                f"LinearLowRank: its factors are packed for {self.compute_dtype} on {bare.device} "
                "and cannot be cast or moved; try casting the model before it is factorized"
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
