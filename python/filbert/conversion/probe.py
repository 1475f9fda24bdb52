"""Proof by example: the original encoder and its replacement, run on the same small input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Example", "allowed_difference", "difference", "make_example"]

#: largest difference of two right computations, as a share of the largest value. Twelve layers of
#: float32 stay below 1e-5, of float16 below 3e-3 and of bfloat16 below 2e-2; another attention
#: differs by far more.
_NEAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: no padding, padding on the right, padding on the left and in the middle
_KEEP = torch.tensor(
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1]], device="cpu"
)


class _Arguments(BaseException):
    """Carries what the encoder is called with out of the model's forward."""


@dataclass
class Example:
    """One call of an encoder, and what the original answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> Tensor:
        """The original's last hidden states ``[B, S, N]``."""
        return _first(self.output)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def make_example(owner: nn.Module | None, encoder: nn.Module, hidden_size: int) -> Example:
    """Runs ``encoder`` once, called as its model calls it.

    Args:
        owner: the module that embeds tokens and calls the encoder. Where it takes ``input_ids``,
            it is run up to the encoder, so that masks and further arguments are the real ones;
            otherwise the encoder gets random rows and an additive mask.
        encoder: the original.
        hidden_size: width of the rows.
    """
    weight = next(encoder.parameters())
    with torch.no_grad(), _readable_attention(owner, encoder):
        call = None if owner is None else _captured(owner, encoder, weight.device)
        if call is None:
            generator = torch.Generator().manual_seed(0)
            shape = (*_KEEP.shape, hidden_size)
            rows = torch.randn(shape, generator=generator, device="cpu").to(weight)
            drop = torch.where(_KEEP == 0, torch.finfo(weight.dtype).min, 0.0)
            call = ((rows, drop[:, None, None, :].to(weight)), {})
        args, kwargs = call
        return Example(args, kwargs, encoder(*args, **kwargs))


def difference(
    example: Example, replacement: nn.Module, every_row: bool = False
) -> tuple[float, float]:
    """``(largest absolute difference, largest allowed)`` of the two on the rows that are kept, or
    on those outside the mask as well."""
    with torch.no_grad():
        got = _first(replacement(*example.args, **example.kwargs))
    want = example.hidden
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf"), 0.0
    kept = _KEEP.to(want.device).bool() | every_row
    allowed = allowed_difference(want[kept])
    want, got = want[kept].double(), got[kept].double()
    worst = float((got - want).abs().max())
    return (worst if worst == worst else float("inf")), allowed


def allowed_difference(want: Tensor) -> float:
    """The largest absolute difference from ``want`` that rounding can explain."""
    return _NEAR[want.dtype] * float(want.abs().max())


def _captured(
    owner: nn.Module, encoder: nn.Module, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What ``owner`` calls ``encoder`` with for a few tokens, or None if it cannot be asked."""
    parameters = inspect.signature(owner.forward).parameters
    if not {"input_ids", "attention_mask"} <= set(parameters):
        return None
    try:
        table = owner.get_input_embeddings()  # type: ignore[operator]
        vocabulary = table.num_embeddings
    except (AttributeError, NotImplementedError, TypeError):
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 2, vocabulary, _KEEP.shape, generator=generator, device="cpu")
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args, kwargs))
        raise _Arguments

    handle = encoder.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        owner(input_ids=ids.to(device), attention_mask=_KEEP.to(device))
    except _Arguments:
        return caught[0]
    except Exception:  # it needs more than tokens (boxes, pixels): ask the encoder directly
        return None
    finally:
        handle.remove()
    return None


@contextmanager
def _readable_attention(*modules: nn.Module | None) -> Iterator[None]:
    """Lets the original run everywhere: flash and flex attention need devices the probe may not
    have, and eager attention computes the same."""
    changed = []
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    try:
        for config in configs.values():
            name = getattr(config, "_attn_implementation", None)
            if name not in (None, "eager", "sdpa"):
                config._attn_implementation = "eager"
                changed.append((config, name))
        yield
    finally:
        for config, name in changed:
            config._attn_implementation = name
