"""Fine-tuning of factors: a model whose linear layers are pairs of thin ones while it trains.

Paper: FlashSVD, arXiv 2508.01506.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...conversion.hugging_face.holders import module_of
from ...nn.lowrank.factors import Factors
from ..calibration import Sample
from .conversion import Job, Ranks, choose, swap_in
from .fisher import Loss

__all__ = ["FactorTraining"]


class _Pair(nn.Module):
    """A linear layer as two; ``a`` may be that of several layers over the same input."""

    def __init__(self, a: nn.Parameter, b: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.a, self.b, self.bias = a, nn.Parameter(b.clone()), bias
        self.in_features, self.out_features = a.shape[1], b.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.a.shape[0]}"
        )


class FactorTraining:
    """Fine-tunes a model with weights of low rank.

    While this lasts, the linear layers of the model's encoders that get factors are pairs of thin
    layers, which any optimizer trains; query, key and value share their first one.
    :meth:`finish` packs what came of it.

    ::

        training = FactorTraining(model, param_ratio=0.5, calibration=texts)
        for batch in batches:                 # model.train(), any loss, any optimizer
            loss(model(**batch)).backward()
            ...
        training.finish()                     # the model is as filbert.factorize makes it

    Make the optimizer after this: parameters are others.

    Args:
        model: as for :func:`filbert.factorize`, and changed in place.
        param_ratio: likewise.
        energy: likewise.
        ranks: likewise.
        never_slower: likewise.
        calibration: likewise.
        tokenizer: likewise.
        loss: likewise.

    Raises:
        ConvertError: whatever :func:`filbert.convert` refuses, before anything is changed.
        ValueError: as for :func:`filbert.factorize`; or no weight gets factors.

    Paper: FlashSVD, arXiv 2508.01506.
    """

    def __init__(
        self,
        model: Any,
        *,
        param_ratio: float | None = None,
        energy: float | None = None,
        ranks: Ranks | None = None,
        never_slower: bool = True,
        calibration: Iterable[Sample] | None = None,
        tokenizer: Any = None,
        loss: Loss | None = None,
    ) -> None:
        self.model = module_of(model, "FactorTraining")
        self._choice = choose(
            self.model, param_ratio, energy, ranks, never_slower, calibration, tokenizer,
            loss, None,
        )  # fmt: skip
        jobs = [job for job in self._choice.jobs if self._choice.ranks[job.name] is not None]
        if not jobs:
            raise ValueError("budget: leaves every weight as it is; try a smaller one")
        names = {module: name for name, module in self.model.named_modules()}
        self._pairs: list[tuple[Job, list[_Pair]]] = []
        self._places: list[tuple[nn.Module, str, nn.Linear]] = []
        for job in jobs:
            factors = self._choice.put(job)
            assert isinstance(factors, Factors)
            a = nn.Parameter(factors.a.clone())
            parts = factors.b.split([linear.out_features for linear in job.linears])
            pairs = []
            for linear, b in zip(job.linears, parts, strict=True):
                where, _, own = names[linear].rpartition(".")
                parent = self.model.get_submodule(where)
                pairs.append(_Pair(a, b, linear.bias))
                self._places.append((parent, own, linear))
                setattr(parent, own, pairs[-1])
            self._pairs.append((job, pairs))

    def cancel(self) -> None:
        """Gives the model its linear layers back, with the products of the trained factors."""
        self._give_back()

    @torch.no_grad()
    def _give_back(self) -> dict[str, Factors]:
        made = {}
        for job, pairs in self._pairs:
            factors = made[job.name] = in_order(
                Factors(pairs[0].a.detach(), torch.cat([pair.b.detach() for pair in pairs]))
            )
            product = factors.weight.split([linear.out_features for linear in job.linears])
            for linear, weight in zip(job.linears, product, strict=True):
                linear.weight.data.copy_(weight)
        for parent, own, linear in self._places:
            setattr(parent, own, linear)
        self._pairs, self._places = [], []
        return made

    def finish(self) -> Any:
        """Packs the trained factors, in the order of what they carry of the weight.

        Returns:
            The model, in eval mode; :func:`filbert.factorization_report` tells its ranks. What is
            kept in it is from before training.
        """
        made = self._give_back()
        self.model.eval()
        swap_in(self._choice, made)
        return self.model


def in_order(factors: Factors) -> Factors:
    """The same product, with the directions that carry most of it first."""
    wide_a, wide_b = factors.a.double(), factors.b.double()
    q, r = torch.linalg.qr(wide_b)
    u, s, v = torch.linalg.svd(r @ wide_a, full_matrices=False)
    return Factors((s[:, None] * v).to(factors.a), (q @ u).to(factors.b))
