"""What every module for inference refuses."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_no_gradient"]


def check_no_gradient(who: str, **tensors: Tensor | None) -> None:
    """Raises if a gradient is asked for: bits have none to give.

    Raises:
        RuntimeError: gradients are recorded and one of the tensors requires one.
    """
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{who} is inference only: {name} requires a gradient, and bits have none to "
                    "give; try 'with torch.inference_mode():' around the call, or train the eager "
                    "model of filbert.compress.binarize"
                )
