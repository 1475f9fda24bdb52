"""What the linear layers of a model get to see: second moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Moments", "Sample", "caller_of", "input_moments"]

#: a text, or the keyword arguments of a call of the model, without padding
Sample = str | Mapping[str, Tensor]


def caller_of(model: nn.Module, tokenizer: Any) -> Callable[[Sample], Any]:
    """What runs ``model`` on one sample.

    Args:
        model: of transformers or sentence-transformers.
        tokenizer: for texts; a sentence-transformers model has its own.
    """
    own = getattr(model, "tokenize", None)
    device = next(model.parameters()).device

    def call(sample: Sample) -> Any:
        if isinstance(sample, str):
            if tokenizer is not None:
                made = tokenizer(sample, return_tensors="pt", truncation=True)
            elif own is not None:
                made = own([sample])
            else:
                raise ValueError(
                    "calibration: got texts for a model without a tokenizer; need tokenizer=, or "
                    "the model's own arguments, a dict of tensors for each call"
                )
        else:
            made = sample
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}
        return model(given) if own is not None and tokenizer is None else model(**given)

    return call


@dataclass
class Moments:
    """What is known of the rows a layer sees.

    Attributes:
        count: rows.
        total: their sum, float64 ``[K]``.
        products: ``X.T @ X``, float64 ``[K, K]``.
    """

    count: int
    total: Tensor
    products: Tensor

    @property
    def mean(self) -> Tensor:
        """``[K]``"""
        return self.total / max(self.count, 1)

    @property
    def centred(self) -> Tensor:
        """``X.T @ X`` of the rows less their mean."""
        return self.products - torch.outer(self.total, self.total) / max(self.count, 1)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Those of rows ``[..., K]``."""
        rows = x.reshape(-1, x.shape[-1]).float()
        return cls(rows.shape[0], rows.sum(0, dtype=torch.float64), (rows.T @ rows).double())


class _Enough(BaseException):
    """Ends a call of the model where the last layer that is asked for has its input. No
    ``Exception``, so that no model code swallows it."""


def input_moments(
    linears: Sequence[nn.Linear], samples: Sequence[Sample], call: Callable[[Sample], Any]
) -> dict[nn.Linear, Moments]:
    """The moments of the rows each layer sees.

    Samples are run one by one, so there is no padding to leave out. Layers over the same input
    share one object.

    Args:
        linears: of one model, in the order in which it calls them.
        samples: texts, or arguments of the model.
        call: of :func:`caller_of`.

    Raises:
        ValueError: no sample, or a layer that none of them reached.
    """
    found: dict[nn.Linear, Moments] = {}
    seen: list[tuple[Tensor, Moments]] = []  # the inputs of this call

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        known = next((made for one, made in seen if one is args[0]), None)
        if known is None:
            known = Moments.of(args[0].detach())
            seen.append((args[0], known))
        assert isinstance(module, nn.Linear)
        found[module] = found[module] + known if module in found else known
        if module is linears[-1]:
            raise _Enough

    hooks = [linear.register_forward_pre_hook(watch) for linear in linears]
    try:
        with torch.no_grad():
            for sample in samples:
                with suppress(_Enough):
                    call(sample)
                seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if not samples:
        raise ValueError("calibration: got no sample, need some texts the model is made for")
    if missing := sum(linear not in found for linear in linears):
        raise ValueError(f"calibration: {missing} of {len(linears)} layers saw no row")
    return found
