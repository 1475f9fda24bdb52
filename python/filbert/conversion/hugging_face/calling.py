"""How Hugging Face models call their encoder, what they want back, and how they collect more.

transformers 4 hands ``output_hidden_states`` and ``return_dict`` to the encoder, which answers;
transformers 5 collects layer outputs beside the call, with hooks on the layers.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["CallConvention", "drop_capture_hooks", "is_capture_hook"]


def _capturing() -> Any:
    """Where transformers 5 says what a caller wants collected, or None if it is not known."""
    module = sys.modules.get("transformers.utils.output_capturing")
    return getattr(module, "_active_collector", None)


def _collector() -> dict[str, Any]:
    """The dict transformers 5 collects layer outputs in; empty while nobody wants any."""
    capturing = _capturing()
    return (capturing.get() or {}) if capturing is not None else {}


def is_capture_hook(hook: Any) -> bool:
    """Whether ``hook`` is one that transformers 5 put on a layer to collect its outputs."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def drop_capture_hooks(model: nn.Module) -> None:
    """Takes off the hooks with which transformers 5 collects layer outputs.

    They are put on once, lazily, on the layers found at that moment. Encoders come and go with
    convert and revert, so transformers has to look again; it does on the next request.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if is_capture_hook(hook):
                del module._forward_hooks[key]
        if "_output_capturing_hooks_installed" in vars(module):
            del module._output_capturing_hooks_installed


#: arguments that mean nothing to an encoder without cache, cross-attention or relative positions
_IGNORED = {
    "use_cache", "position_ids", "cache_position",
    # of the loss, which is computed after the encoder
    "num_items_in_batch", "shift_labels", "ignore_index",
}  # fmt: skip
_RENAMED = {"x": "hidden_states", "attn_mask": "attention_mask"}


def _nothing(value: Any) -> bool:
    """None, False, or a list of None, which is how transformers 4 says "no head mask"."""
    return value is None or value is False or (isinstance(value, (list, tuple)) and not any(
        v is not None for v in value
    ))  # fmt: skip


def _restarts(positions: Tensor) -> bool:
    return bool((positions.diff(dim=-1) != 1).any())


@dataclass
class CallConvention:
    """How one original encoder is called and what it returns.

    Attributes:
        names: its positional parameters.
        returns_states: it takes ``output_hidden_states`` and returns them itself (transformers 4);
            otherwise transformers 5 collects them beside the call.
        output_type: the ``ModelOutput`` class it returns; ``tuple`` and ``Tensor`` are themselves.
        config: the model's configuration, read for flags at every call.
    """

    names: tuple[str, ...]
    returns_states: bool
    dict_default: bool
    config: Any = None
    output_type: Any = Tensor

    @classmethod
    def of(cls, encoder: nn.Module, config: Any) -> CallConvention:
        """Reads the signature of ``encoder.forward``."""
        parameters = inspect.signature(encoder.forward).parameters
        wants_dict = parameters.get("return_dict")
        return cls(
            names=tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD),
            returns_states="output_hidden_states" in parameters,
            dict_default=wants_dict is None or bool(wants_dict.default),
            config=config,
        )

    def read(
        self, hidden_states: Any, attention_mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Any, bool, bool]:
        """``(hidden_states, attention_mask, want_states, return_dict)`` of one call.

        Raises:
            TypeError: no hidden states.
            NotImplementedError: an argument that asks for something a packed encoder cannot do.
        """
        values = dict(zip(self.names[2:], args, strict=False)) if args else {}
        values.update(kwargs)
        for old, new in _RENAMED.items():
            if old in values:
                if new == "hidden_states":
                    hidden_states = values.pop(old)
                else:
                    attention_mask = values.pop(old)
        if not isinstance(hidden_states, Tensor):
            raise TypeError(
                f"hidden_states: got {type(hidden_states).__name__}, need a tensor [B, S, N]"
            )
        want_states = bool(values.pop("output_hidden_states", False))
        return_dict = values.pop("return_dict", None)
        return_dict = self.dict_default if return_dict is None else bool(return_dict)
        wrong = [n for n, v in values.items() if n not in _IGNORED and not _nothing(v)]
        collected = _collector()
        wrong += [f"output_{n}" for n in collected if n.endswith("attentions")]
        if "flash" in str(getattr(self.config, "_attn_implementation", "")):
            # There, restarting position ids are a second way to say where sequences end.
            positions = values.get("position_ids")
            if isinstance(positions, Tensor) and attention_mask is None and _restarts(positions):
                wrong.append("position_ids (several sequences in one row)")
        if wrong:
            raise NotImplementedError(
                f"the packed encoder cannot do what these arguments ask: {sorted(set(wrong))}; "
                "try without them, or filbert.revert(model)"
            )
        if not self.returns_states:
            asked = want_states or bool(getattr(self.config, "output_hidden_states", False))
            if asked and _capturing() is None:
                raise NotImplementedError(
                    "output_hidden_states: this version of transformers does not say how it "
                    "collects them; try without it, or filbert.revert(model)"
                )
            want_states = "hidden_states" in collected
        return hidden_states, attention_mask, want_states, return_dict

    def give(self, output: Tensor, states: list[Tensor] | None, return_dict: bool) -> Any:
        """The output in the form the original encoder has."""
        if states is not None and not self.returns_states:
            collected = _collector()
            chosen = collected.get("_hidden_states_layers")
            kept = collected["hidden_states"]
            for state in states:
                kept.append(state if chosen is None or len(kept) in chosen else None)
            states = None
        if self.output_type is Tensor:
            return output
        if self.output_type is tuple or not return_dict:
            return (output,) if states is None else (output, tuple(states))
        if states is None:
            return self.output_type(last_hidden_state=output)
        return self.output_type(last_hidden_state=output, hidden_states=tuple(states))
