"""`load_quantized`: models of few bits from disk, through transformers' own loading.

transformers makes the model on the meta device, filbert puts modules in the place of quantized
layers whose tensors are those of the file, transformers loads them, and filbert converts.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...nn.grouped.embedding import EmbeddingGrouped
from ...nn.grouped.weight import GroupedWeight
from ..checked_files import crc32_of, verify
from .checkpoint import CONFIG_FILE, METHOD, WEIGHTS_FILE, Manifest, WeightEntry
from .conversion import swap_in

__all__ = ["load_quantized", "register"]


class _Waiting(nn.Module):
    """Tensors of a quantized layer or table, while transformers loads them."""

    def __init__(
        self,
        entry: WeightEntry,
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.entry, self.parts = entry, tuple(shapes)
        for part, (dtype, shape) in shapes.items():
            self.register_buffer(part, torch.empty(shape, dtype=dtype, device=device))

    #: its name in the saved model
    saved_as = ""

    def check(self, name: str, manifest: Manifest) -> None:
        for part in self.parts:
            t = getattr(self, part)
            if t.is_meta:
                raise ValueError(f"{name}.{part}: the file has no such tensor")
            if crc32_of(t) != manifest.crc32.get(f"{name}.{part}"):
                raise ValueError(
                    f"{name}.{part} is damaged, its bytes are not those that were saved; try "
                    "copying the folder again"
                )


class _WaitingLinear(_Waiting):
    """Of a linear layer; the bias is a parameter of the model's dtype."""

    def __init__(self, linear: nn.Linear, entry: WeightEntry) -> None:
        outputs, inputs = linear.out_features, linear.in_features
        super().__init__(entry, entry.shapes(outputs, inputs), linear.weight.device)
        self.in_features, self.out_features, self.dtype = inputs, outputs, linear.weight.dtype
        self.bias = linear.bias

    def weight(self) -> GroupedWeight:
        held = {part: getattr(self, part).clone() for part in self.parts}
        found = GroupedWeight(
            bits=self.entry.bits, outputs=self.out_features, inputs=self.in_features, **held
        )
        found.totals()  # no sum of it can exceed int32, whatever the file says
        return found

    def linear(self, weight: GroupedWeight) -> nn.Linear:
        made = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        # A copy: the name is the module's, the numbers are those of the codes.
        made.weight = nn.Parameter(weight.dequantize(self.dtype), requires_grad=False)
        made.bias = self.bias
        return made


class _WaitingTable(_Waiting):
    """Of an embedding table."""

    def __init__(self, table: nn.Embedding, entry: WeightEntry) -> None:
        shapes = entry.table_shapes(table.num_embeddings, table.embedding_dim)
        super().__init__(entry, shapes, table.weight.device)
        self.width, self.padding_idx = table.embedding_dim, table.padding_idx
        self.dtype = table.weight.dtype

    def table(self) -> EmbeddingGrouped:
        codes, scale = (getattr(self, part).clone() for part in self.parts)
        return EmbeddingGrouped.of_codes(
            codes, scale, self.width, self.entry.bits, self.padding_idx, self.dtype
        )


def _name_in(model: nn.Module, name: str) -> str | None:
    """The name that a module of the saved model has in ``model``: a model may be loaded without the
    head it was saved with, and the other way round."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    above, _, own = name.rpartition(".")
    model.get_submodule(above)._modules[own] = module


def prepare(model: nn.Module, manifest: Manifest) -> None:
    """Puts modules that wait for the file's tensors in the place of quantized layers."""
    for entries, kind, waiting in (
        (manifest.weights, nn.Linear, _WaitingLinear),
        (manifest.tables, nn.Embedding, _WaitingTable),
    ):
        for name, entry in entries.items():
            found = _name_in(model, name)
            if found is None:
                continue  # of a head that this model does not have
            module = model.get_submodule(found)
            if not isinstance(module, kind):
                raise ValueError(
                    f"{name}: got a {type(module).__name__}, need a {kind.__name__} to load the "
                    "quantized weight into"
                )
            made = waiting(module, entry)  # type: ignore[arg-type]
            made.__dict__["saved_as"] = name
            _put(model, found, made)


def finish(model: nn.Module, manifest: Manifest) -> None:
    """Makes the packed model of one whose tensors are loaded."""
    model.eval()
    made: dict[nn.Linear, GroupedWeight] = {}
    bits: dict[str, int | None] = {}
    nbytes, inputs = {}, {}
    with torch.inference_mode(False), torch.no_grad():
        for name, module in list(model.named_modules()):
            if not isinstance(module, _Waiting):
                continue
            module.check(module.saved_as, manifest)
            if isinstance(module, _WaitingTable):
                table = module.table().eval()
                _put(model, name, table)
                nbytes[module.saved_as] = table.nbytes
            elif isinstance(module, _WaitingLinear):
                weight = module.weight()
                linear = module.linear(weight).eval()
                _put(model, name, linear)
                made[linear], bits[name] = weight, weight.bits
                nbytes[module.saved_as] = weight.nbytes
                inputs[module.saved_as] = weight.inputs
        # One tensor of a file that is mapped keeps all its pages: nothing is left in there.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    swap_in(model, bits, made, manifest.settings)
    # In the order of the model, and only what it has.
    weights, tables = (
        {name: held[name] for name in nbytes if name in held}
        for held in (manifest.weights, manifest.tables)
    )
    loaded = Manifest(weights, tables, method=manifest.method)
    loaded.report(nbytes, inputs).attach(model)


@cache
def register() -> None:
    """Makes ``AutoModel.from_pretrained`` and ``SentenceTransformer(folder)`` read folders of
    :func:`filbert.save_quantized`. Imports transformers."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class FilbertConfig(QuantizationConfigMixin):
        """``quantization_config`` of a folder."""

        def __init__(self, **fields: Any) -> None:
            self.fields = {**fields, "quant_method": METHOD}
            self.quant_method = METHOD  # type: ignore[assignment]

        @classmethod
        def from_dict(
            cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
        ) -> Any:
            made = cls(**config_dict)
            return (made, kwargs) if return_unused_kwargs else made

        def to_dict(self) -> dict[str, Any]:
            return dict(self.fields)

    class FilbertQuantizer(HfQuantizer):
        """Loads, and leaves a model as :func:`filbert.quantize` makes one."""

        requires_calibration = True
        is_trainable = False

        def _manifest(self) -> Manifest:
            return Manifest.from_dict(self.quantization_config.to_dict())

        def update_dtype(self, dtype: Any) -> Any:
            # transformers 4 casts every float of the file to one dtype, and scales stay float32.
            self.asked = dtype
            return torch.float32

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            prepare(model, self._manifest())
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            manifest = self._manifest()
            finish(model, manifest)
            dtype = manifest.dtype if self.asked == "auto" else self.asked or torch.float32
            model.to(dtype)
            # What it saves and casts from now on is what its state_dict says: float weights.
            self.remove_quantization_config(model)
            return model

        def _convert_model_for_quantization(self, model: Any) -> None:
            return

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = FilbertConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = FilbertQuantizer


def load_quantized(
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Any:
    """Reads what :func:`filbert.save_quantized` wrote.

    Every tensor is compared with the CRC-32 that was saved. The float weights of the encoder exist
    for a moment while it is packed. ``filbert.compress.quantize.register()`` makes
    ``AutoModel.from_pretrained`` and ``SentenceTransformer`` read such folders too.

    Args:
        folder: of a transformers model or of a SentenceTransformer.
        device: where the model goes.
        dtype: of what is not quantized, and of the rows of the model; as saved if not given.

    Returns:
        A transformers model of the class that was saved, or a SentenceTransformer; in eval mode,
        and the same to the bit as the one that was saved.

    Raises:
        OSError: no such folder or file.
        ValueError: a folder of something else, of another format, or a tensor that is cut off,
            missing or damaged, with its name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: No such folder, need one of filbert.save_quantized")
    sentences = (folder / "modules.json").exists()
    inner = [path.parent for path in sorted(folder.rglob(CONFIG_FILE)) if _is_ours(path)]
    if not inner or not (sentences or inner[0] == folder):
        raise ValueError(
            f"{folder}: got no {CONFIG_FILE} with a quantization_config of filbert, need a folder "
            "of filbert.save_quantized; weights of GPTQ or compressed-tensors are read by "
            "filbert.import_quantized"
        )
    for path in inner:
        if not (path / WEIGHTS_FILE).exists():
            raise FileNotFoundError(f"{path / WEIGHTS_FILE}: No such file")
        manifest = Manifest.from_dict(_quantization_of(path / CONFIG_FILE))
        verify(path / WEIGHTS_FILE, manifest.crc32)
    register()
    options = {"dtype": dtype or "auto"}
    if sentences:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(
            str(folder), device=str(device), model_kwargs=options, local_files_only=True
        ).eval()
    import transformers

    named = json.loads((folder / CONFIG_FILE).read_text())["architectures"][0]
    model = getattr(transformers, named).from_pretrained(folder, local_files_only=True, **options)
    return model.to(device)


def _quantization_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()).get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: got no JSON of a config ({error})") from error
    return found if isinstance(found, dict) else {}


def _is_ours(path: Path) -> bool:
    return _quantization_of(path).get("quant_method") == METHOD
