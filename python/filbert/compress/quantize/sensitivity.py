"""How much a model's output minds a change of each weight: the Hessian, without ever forming it.

Products of the Hessian with a vector take two backward passes. The loss is the squared distance of
the output from what it is now, whose Hessian is ``J.T @ J`` and needs no labels; or anybody's own.

Paper: Q-BERT, arXiv 1909.05840 (top eigenvalues, their mean and spread over the data); HAWQ-V2,
arXiv 1911.03852 (the trace).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Sample

__all__ = ["Loss", "hessian_traces", "output_of", "top_eigenvalues"]

#: what a call of the model returned -> a scalar
Loss = Callable[[Any], Tensor]


def output_of(result: Any) -> Tensor:
    """The hidden states, logits or vectors that a call of a model returned."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        for name in ("sentence_embedding", "logits", "last_hidden_state"):
            if result.get(name) is not None:
                return result[name]
    return output_of(result[0])


def distance(result: Any) -> Tensor:
    """Half the squared distance of an output from itself as it is: 0, with a Hessian."""
    output = output_of(result).float()
    return 0.5 * (output - output.detach()).square().sum() / output.shape[0]


@contextmanager
def _twice_differentiable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Fused attention has no second derivative: eager attention for a while, and weights that
    require gradients."""
    changed = []
    for module in model.modules():
        config = getattr(module, "config", None)
        name = getattr(config, "_attn_implementation", None)
        if name not in (None, "eager"):
            config._attn_implementation = "eager"  # type: ignore[union-attr]
            changed.append((config, name))
    flags = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
        for config, name in changed:
            config._attn_implementation = name  # type: ignore[union-attr]


def _gradients(loss: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, weights, create_graph=True)


def _products(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The Hessian's block of ``weights``, times ``vectors``."""
    total = sum((g * v).sum() for g, v in zip(gradients, vectors, strict=True))
    return torch.autograd.grad(total, weights, retain_graph=True)  # type: ignore[arg-type]


def top_eigenvalues(
    model: nn.Module,
    blocks: Mapping[str, Sequence[Tensor]],
    samples: Sequence[Sample],
    call: Callable[[Sample], Any],
    *,
    loss: Loss = distance,
    iterations: int = 10,
    tolerance: float = 1e-2,
) -> dict[str, float]:
    """``|mean| + standard deviation`` over the samples of the top eigenvalue of each block's
    Hessian, by power iteration: Q-BERT's sensitivity.

    Args:
        model: in eval mode, not converted.
        blocks: name -> the weights of a block of the Hessian.
        samples: each is a sample of the data of its own.
        call: runs the model on one.
        loss: of what the call returned.
        iterations: at most.
        tolerance: relative change of an eigenvalue that ends the iteration.

    Paper: Q-BERT, arXiv 1909.05840.
    """
    generator = torch.Generator().manual_seed(0)
    every = [weight for weights in blocks.values() for weight in weights]
    found: dict[str, list[float]] = {name: [] for name in blocks}
    with _twice_differentiable(model, every), torch.enable_grad():
        for sample in samples:
            value = loss(call(sample))
            for name, weights in blocks.items():
                gradients = torch.autograd.grad(
                    value, list(weights), create_graph=True, retain_graph=True
                )
                vectors = _unit([torch.randn(w.shape, generator=generator).to(w) for w in weights])
                last = 0.0
                for _ in range(iterations):
                    products = _products(gradients, list(weights), vectors)
                    now = float(sum((p * v).sum() for p, v in zip(products, vectors, strict=True)))
                    vectors = _unit(products)
                    done = abs(now - last) <= tolerance * abs(now)
                    last = now
                    if done:
                        break
                found[name].append(last)
    return {name: _spread(values) for name, values in found.items()}


def _unit(vectors: Sequence[Tensor]) -> list[Tensor]:
    size = torch.sqrt(sum(v.square().sum() for v in vectors))  # type: ignore[arg-type]
    return [v / size.clamp(min=1e-30) for v in vectors]


def _spread(values: Sequence[float]) -> float:
    held = torch.tensor(values, dtype=torch.float64)
    return float(held.mean().abs() + (held.std() if len(values) > 1 else 0.0))


def hessian_traces(
    model: nn.Module,
    blocks: Mapping[str, Sequence[Tensor]],
    samples: Sequence[Sample],
    call: Callable[[Sample], Any],
    *,
    loss: Loss = distance,
    probes: int = 2,
) -> dict[str, float]:
    """The mean trace of each block's Hessian, by its number of weights: Hutchinson's estimate from
    random signs. One probe serves all blocks.

    Arguments as of :func:`top_eigenvalues`; ``probes`` for each sample.

    Paper: HAWQ-V2, arXiv 1911.03852.
    """
    generator = torch.Generator().manual_seed(0)
    names = [name for name, weights in blocks.items() for _ in weights]
    every = [weight for weights in blocks.values() for weight in weights]
    sizes = {name: sum(w.numel() for w in weights) for name, weights in blocks.items()}
    found = dict.fromkeys(blocks, 0.0)
    with _twice_differentiable(model, every), torch.enable_grad():
        for sample in samples:
            gradients = _gradients(loss(call(sample)), every)
            for _ in range(probes):
                signs = [
                    (torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w) for w in every
                ]
                products = _products(gradients, every, signs)
                for name, product, sign in zip(names, products, signs, strict=True):
                    found[name] += float((product * sign).sum())
    count = max(1, len(samples) * probes)
    return {name: total / count / sizes[name] for name, total in found.items()}
