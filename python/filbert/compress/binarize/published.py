"""The names that published checkpoints give to what the modules here learn."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["UNREAD", "publish"]

#: entries of published checkpoints that their own forward pass never reads, per module
UNREAD = ("weight_clip_val", "act_clip_val", "scale", "gate", "move_q.bias", "move_k.bias",
          "move_v.bias")  # fmt: skip


def publish(module: nn.Module, names: dict[str, str], unread: tuple[str, ...] = UNREAD) -> None:
    """Gives entries of ``module``'s state dict their published names, when saved and when loaded.

    Args:
        module: whose entries; modules above it need nothing.
        names: our name -> the published one, both relative to ``module``.
        unread: published entries that mean nothing and are dropped when loaded.
    """
    # Functions of this module rather than closures, so that the module can be pickled.
    module.register_state_dict_post_hook(partial(_saved, names))
    module.register_load_state_dict_pre_hook(partial(_loading, names, unread))


def _saved(
    names: dict[str, str], _: nn.Module, state: dict[str, Tensor], prefix: str, __: Any
) -> None:
    for ours, theirs in names.items():
        if prefix + ours in state:
            state[prefix + theirs] = state.pop(prefix + ours)


def _loading(
    names: dict[str, str], unread: tuple[str, ...], _: nn.Module, state: dict[str, Tensor],
    prefix: str, *__: Any,
) -> None:  # fmt: skip
    for name in unread:
        state.pop(prefix + name, None)
    for ours, theirs in names.items():
        if prefix + theirs in state:
            value = state.pop(prefix + theirs)
            # A scale is saved as [1] by some versions of the published code.
            scalar = ours.endswith("scale") and value.numel() == 1
            state[prefix + ours] = value.reshape(()) if scalar else value
