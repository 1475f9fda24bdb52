"""The module that stands where an encoder stood, and can give the encoder back.

To the outside it is still the original: it is called the same way, and its ``state_dict`` has the
original names and dense weights, and its parameters answer for their number, shapes, dtype and
device. Inside, the weights exist once, packed; the original modules are kept as a skeleton whose
linear weights are placeholders until they are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.build import CompressedParts, why_not
from ..nn.dense.weights import DenseWeights
from ..nn.encoder import PackedEncoder
from ..nn.layer import EncoderLayer
from ..nn.parts import LayerParts
from ..nn.placeholder import Placeholders, Watch
from ..plan import EncoderPlan
from ..refusals import below_autograd, is_exporting, refuse_recording

__all__ = ["EncoderReached", "SwappedEncoder", "stop_at_encoder"]

#: what can be recorded in the place of a converted model
_INSTEAD = (
    "filbert.revert(model) before tracing or exporting it, or the converted model as it is: "
    "torch.compile(model) compiles around its encoder"
)


class EncoderReached(BaseException):
    """Carries what a model hands to its encoder out of the model's forward; see
    :func:`filbert.embed`. No ``Exception``, so that no model code swallows it."""

    def __init__(self, encoder: SwappedEncoder, hidden_states: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.hidden_states = hidden_states


#: set while a model is run only as far as its encoder
stop_at_encoder: ContextVar[bool] = ContextVar("filbert_stop_at_encoder", default=False)


class SwappedEncoder(PackedEncoder):
    """A :class:`PackedEncoder` in the place of a Hugging Face encoder.

    Args:
        original: the encoder; its linear weights become placeholders. Its parameters are this
            module's too, by their original names; writing to one is an error at the next call.
        read_layers: gives the parts of every layer of an encoder, or the reasons why not. It is
            kept, because weights are packed again after a cast, a move or a load.
        convention: how the encoder is called; see
            :class:`filbert.conversion.hugging_face.calling.CallConvention`.
        plan: which kind each slot of each layer is, and the settings.
        compressed: the weights of grouped and low-rank slots, by layer; None where there are none.
    """

    compressed: list[CompressedParts] | None

    def __init__(
        self,
        original: nn.Module,
        read_layers: Callable[[nn.Module], tuple[list[LayerParts], list[str]]],
        convention: Any,
        plan: EncoderPlan,
        compressed: list[CompressedParts] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        _keep_dynamo_out()
        # Not registered as a submodule: code that walks the model to wrap or to quantize its layers
        # should not find modules that are never called.
        self.__dict__["original"] = original
        self.read_layers = read_layers
        self.convention = convention
        self.plan, self.compressed = plan, compressed
        self.masked_rows = plan.settings.masked_rows
        self.refusals: list[str] = []
        lists = [n for n, m in original.named_children() if isinstance(m, nn.ModuleList)]
        self.list_name = lists[0]
        self.train(original.training)
        self.register_load_state_dict_post_hook(_packed_anew)
        self.pack_weights()
        if self.refusals:
            raise ValueError("; ".join(self.refusals))

    # --- the weights: packed, or dense in the original, never both for long ---

    @property
    def is_packed(self) -> bool:
        """Whether the weights are packed; if not, ``refusals`` says why."""
        return "packed_layers" in self._modules

    def pack_weights(self, written: Iterable[str] = ()) -> None:
        """Packs the original's weights, layer by layer, letting go of each as soon as it is packed.

        Args:
            written: parameters that were written in place before, and not loaded since.
        """
        if self.is_packed:
            return
        self._drop_guard()
        with torch.inference_mode(False), torch.no_grad():
            parts, self.refusals = self.read_layers(self.original)
            self.refusals += refusals_of(self.plan, parts, self.compressed)
            if not self.refusals:
                self._pack(parts)
            self._show_parameters(written)

    def _pack(self, parts: list[LayerParts]) -> None:
        # The dicts themselves: whoever replaces a parameter or changes its flag is seen.
        self._originals = [m._parameters for m in self.original.modules() if m._parameters]
        #: the original modules whose weights are packed, by layer
        self.linears = [layer.linears() for layer in parts]
        self.part_names = [layer.names for layer in parts]
        weights = [m.weight for linears in self.linears for m in linears]
        largest = max(w.numel() for w in weights)
        self._placeholders = Placeholders(weights[0].new_empty(0), largest)
        try:
            self._build(
                parts,
                self.plan.settings.fold_bias,
                packed=lambda own, layer: self._hide(own.linears(), layer),
                plan=self.plan,
                compressed=self.compressed,
            )
        except BaseException:
            self._fill_weights()
            self._modules.pop("packed_layers", None)
            raise
        self.original.register_forward_pre_hook(_refuse_skeleton)

    def _drop_guard(self) -> None:
        hooks = self.original._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _refuse_skeleton]:
            del hooks[key]

    def follow(self, plan: EncoderPlan, compressed: list[CompressedParts] | None = None) -> None:
        """Packs the weights again, as ``plan`` says, some slots with weights of ``compressed``."""
        self.unpack_weights()
        self.compressed = compressed
        self.plan, self.masked_rows = plan, plan.settings.masked_rows
        self.pack_weights()

    def unpack_weights(self) -> None:
        """Puts every dense weight back into the original, bit for bit; drops the packed ones."""
        if self.is_packed:
            with _dense_weights:
                self._fill_weights()
                del self.packed_layers
            self._drop_guard()
            self._buffers.pop(_WIDENED, None)

    def _show_parameters(self, written: Iterable[str]) -> None:
        """The original's parameters are this module's; from here on their writes are counted.
        ``written`` are those whose written values are lost."""
        named = dict(self.original.named_parameters())
        self.__dict__["_parameters"] = named
        self.__dict__["_watch"] = Watch(named.items(), before=written)
        if self.is_packed and self.compute_dtype != self.model_dtype:
            # Widened weights take more bytes than the parameters say. A buffer says the rest.
            packed = sum(m.weight.numel() for linears in self.linears for m in linears)
            held = sum(
                linear.weight_bytes
                for layer in self.layers
                for _, linear in layer.linears()
                if linear.keeps_weight
            )
            more = max(0, held - packed * self.model_dtype.itemsize)
            device = next(iter(named.values())).device
            byte = torch.empty(1, dtype=torch.uint8, device=device)
            self.register_buffer(_WIDENED, byte.expand(more), persistent=False)

    def _written(self) -> list[str]:
        """Parameters whose written values are lost. While nothing is packed, no write is."""
        return self._watch.written() if self.is_packed else self._watch.before

    def check_unwritten(self) -> None:
        """Raises RuntimeError if a parameter was written since its value was packed."""
        if written := self._written():
            name, more = written[0], len(written) - 1
            raise RuntimeError(
                f"{name!r}{f' and {more} more' if more else ''}: written in place after "
                "filbert.convert, which packed a copy that does not change; need new values by "
                "load_state_dict; try model.load_state_dict(...), or filbert.revert before writing"
            )

    def _fill_weights(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for linears, layer in zip(self.linears, self.layers, strict=False):
                for linear, weight in zip(linears, layer.dense_weights(), strict=True):
                    if weight is not None:  # else it was never let go
                        linear.weight.data = weight

    def _hide(self, linears: tuple[nn.Linear, ...], layer: EncoderLayer) -> None:
        """Lets go of the dense weights of a packed layer: views of the packed ones where these are
        dense too, else placeholders."""
        with torch.inference_mode(False), torch.no_grad():
            parts = zip(linears, layer.shared_weights(), layer.keeps_weights(), strict=True)
            for linear, shared, kept in parts:
                shape = (linear.out_features, linear.in_features)
                if kept:
                    linear.weight.data = self._placeholders.of(shape) if shared is None else shared

    def _wants_gradients(self) -> bool:
        return any(
            p is not None and p.requires_grad for own in self._originals for p in own.values()
        )

    @contextmanager
    def _dense(self) -> Iterator[nn.Module]:
        """The original with its weights in it, for a moment."""
        if not self.is_packed:
            yield self.original
            return
        with _dense_weights:
            self._fill_weights()
            try:
                yield self.original
            finally:
                for linears, layer in zip(self.linears, self.layers, strict=True):
                    self._hide(linears, layer)

    # --- calls ---

    def forward(
        self,
        hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Called and answering like the original encoder.

        Args:
            hidden_states: ``[B, S, N]`` in ``model_dtype``.
            attention_mask: what the model makes of its mask, for whichever attention
                implementation: None, 2-D, or 4-D boolean or additive.
            args: further positional arguments of the original.
            kwargs: further arguments of the original. Those that ask for nothing are ignored;
                ``output_hidden_states`` and ``return_dict`` are done.

        Returns:
            What the original returns. Rows that were padding are zeros, unless the encoder was
            converted with ``masked_rows="compute"``.

        Raises:
            NotImplementedError: an argument that asks for something else, such as attentions, a
                head mask, a cache or cross-attention.
                Under ``torch.jit.trace`` and ``torch.export`` any call.
            RuntimeError: training mode with dropout; an input or a weight that requires a gradient
                while gradients are recorded; weights that were cast or moved to where filbert has
                no kernels; or parameters that were written in place.
        """
        hidden_states, attention_mask, want_states, return_dict = self.convention.read(
            hidden_states, attention_mask, args, kwargs
        )
        if not self.is_packed:
            raise RuntimeError(
                "the encoder was converted and then changed so that filbert cannot run it: "
                + "; ".join(self.refusals)
                + "; or filbert.revert(model)"
            )
        self.check_unwritten()
        refuse_recording("a converted model", hidden_states, _INSTEAD)
        if stop_at_encoder.get():
            raise EncoderReached(self, hidden_states)
        self._check_inference(hidden_states)
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            # The rows are the weights' dtype already; a cast in one of the steps would split them.
            with torch.autocast(device, enabled=False):
                return self._forward(hidden_states, attention_mask, want_states, return_dict)
        if hidden_states.dtype != self.model_dtype:
            raise TypeError(
                f"hidden_states: got {hidden_states.dtype}, need {self.model_dtype} like the "
                "weights; try casting the whole model"
            )
        return self._forward(hidden_states, attention_mask, want_states, return_dict)

    def _forward(
        self, hidden_states: Tensor, mask: Any, want_states: bool, return_dict: bool
    ) -> Any:
        with below_autograd():
            batch = self.read_mask(hidden_states, mask)
            dtype = hidden_states.dtype
            if not want_states:  # nobody holds the first rows while layers run
                rows = self._run(self.pack(hidden_states, batch), batch)
                return self.convention.give(batch.unpack(rows.to(dtype)), None, return_dict)
            rows, states = self.pack(hidden_states, batch), [hidden_states]
            for layer in self.layers:
                rows, batch = layer(rows, batch)
                states.append(batch.unpack(rows[: batch.num_rows].to(dtype)))
            return self.convention.give(states[-1], states, return_dict)

    # --- what torch does to modules ---

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            if original is None:
                raise
            if name == "config" and hasattr(original, "config"):
                return original.config
            if hasattr(original, name):
                if is_exporting():  # it looks its parameters up before any call
                    refuse_recording("a converted model", None, _INSTEAD)
                raise AttributeError(
                    f"{name!r} is part of the original {type(original).__name__}, whose weights "
                    "are packed; try filbert.revert(model) first"
                ) from None
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse_part(name)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As of any module; refuses the name of a part of the original."""
        self._refuse_part(name)
        super().add_module(name, module)

    def _refuse_part(self, name: str) -> None:
        """Raises where an assignment would replace a part of the original: it is never called."""
        original = self.__dict__.get("original")
        if original is not None and (name in original._modules or name in original._parameters):
            raise AttributeError(
                f"{name!r} is part of the original {type(original).__name__}, whose weights are "
                "packed, and a new one would not be used; try filbert.revert(model) first, then "
                "filbert.convert again"
            )

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """The original's names and dense weights, in the original's order.

        Raises:
            RuntimeError: parameters that were written in place.
        """
        del keep_vars  # the parameters themselves are placeholders; what is given is detached
        self.check_unwritten()
        with self._dense() as original:
            return original.state_dict(*args, destination=destination, prefix=prefix)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        lost = self._written()
        written = [name for name in lost if name not in own]
        self.unpack_weights()
        try:
            result = self.original.load_state_dict(
                own, strict=False, assign=local_metadata.get("assign_to_params_buffers", False)
            )
            missing_keys += [prefix + key for key in result.missing_keys]
            if strict:
                unexpected_keys += [prefix + key for key in result.unexpected_keys]
        except RuntimeError as error:
            error_msgs.append(str(error))
            written = lost  # which of them were loaded is not known
        finally:
            self.pack_weights(written)  # and reads the parameters anew: assign=True replaces them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SwappedEncoder:
        """Casts and moves the original, and packs again; does nothing where ``fn`` would not."""
        tensors = (*self.original.parameters(), *self.original.buffers())
        bare = [
            torch.empty(0, dtype=d, device=p) for d, p in {(t.dtype, t.device) for t in tensors}
        ]
        if all(fn(tensor) is tensor for tensor in bare):
            return self
        written = self._written()
        self.unpack_weights()
        self.original._apply(fn, recurse)
        self.pack_weights(written)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Dense weights travel (deepcopy, pickle, torch.save, other processes); the packed ones are
        made again."""
        self.check_unwritten()
        state = self.__dict__.copy()
        modules = state["_modules"] = dict(state["_modules"])
        state["_parameters"], state["_buffers"] = {}, {}
        del state["_watch"]
        state.pop("_placeholders", None)
        if modules.pop("packed_layers", None) is not None:
            with torch.inference_mode(False), torch.no_grad():
                weights = (w for layer in self.layers for w in layer.dense_weights())
                state["weights"] = DenseWeights(w for w in weights if w is not None)
                state["kept"] = [kept for layer in self.layers for kept in layer.keeps_weights()]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        _keep_dynamo_out()
        weights, kept = state.pop("weights", None), state.pop("kept", ())
        super().__setstate__(state)
        if weights is not None:
            every = (linear for linears in self.linears for linear in linears)
            flat = (linear for linear, gone in zip(every, kept, strict=True) if gone)
            with torch.inference_mode(False), torch.no_grad():
                for linear, weight in zip(flat, weights, strict=True):
                    # What was loaded in inference mode counts no writes.
                    linear.weight.data = weight.clone() if weight.is_inference() else weight
        self.pack_weights()


def refusals_of(
    plan: EncoderPlan, parts: list[LayerParts], compressed: list[CompressedParts] | None = None
) -> list[str]:
    """Why layers of ``parts`` cannot be built as ``plan`` says; empty if they can."""
    reasons = plan.problems(len(parts)) if parts else []
    for index, layer_parts in enumerate(parts):
        own = compressed[index] if compressed else None
        found = why_not(layer_parts, plan.of(index), own)
        reasons += [f"layer {index}: {why}" for why in found]
    return reasons


def _refuse_skeleton(original: nn.Module, inputs: Any) -> None:
    """The hook of an original whose weights are packed: for those who took it out before."""
    raise RuntimeError(
        f"this {type(original).__name__} was taken out of its model before filbert.convert, which "
        "packed its weights; need the model that was converted; try calling that, or "
        "filbert.revert on it"
    )


def _packed_anew(encoder: SwappedEncoder, keys: Any) -> None:
    """The hook after loading: packed layers took theirs from the original, which was loaded."""
    keys.missing_keys[:] = [k for k in keys.missing_keys if ".packed_layers." not in f".{k}"]


def _keep_dynamo_out() -> None:
    """``torch.compile`` of a model compiles around its packed encoder.

    The GEMMs inside run on opaque oneDNN tensors, which Inductor cannot lower, and the number of
    rows differs with every batch. Done at the first conversion and not at import, because it
    imports Dynamo, which every transformers model has imported already.
    """
    if not hasattr(SwappedEncoder.forward, "_torchdynamo_disable"):
        disabled = torch.compiler.disable(
            SwappedEncoder.forward,
            reason="filbert's packed encoder is compiled around, not through: the number of its "
            "rows depends on the values of the mask. Try torch.compile(model) without "
            "fullgraph=True, or filbert.revert(model) before exporting it",
        )
        SwappedEncoder.forward = disabled  # type: ignore[method-assign]


#: held while dense weights lie in an original, which threads share
_dense_weights = threading.RLock()

#: the buffer whose size is what packed weights take beyond what the parameters say
_WIDENED = "widened"
