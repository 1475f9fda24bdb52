"""Models of few bits on disk: one safetensors file, and what it means in ``config.json``.

A folder is that of a transformers model. Its ``quantization_config`` names every quantized weight
and has a CRC-32 of every tensor. A weight is stored in the layout that all devices compute with::

    NAME.packed       uint8 [ceil(N/16), ceil(K/32), 64 * bits]
    NAME.scale        float32 [N]
    NAME.multiplier   uint8 [ceil(N/16), G, 16]     where groups have one
    NAME.zero         uint8 [ceil(N/16), G, 16]     where codes are asymmetric
    NAME.codes        uint8 [V, N or N/2]           of an embedding table, beside NAME.scale [V]

Everything else is stored as transformers does it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...conversion.hugging_face.holders import is_sentence_transformer, module_of
from ...conversion.swap import SwappedEncoder
from ...nn.build import CompressedParts
from ...nn.grouped.embedding import EmbeddingGrouped
from ...nn.grouped.weight import GroupedWeight
from ...nn.lowrank.factors import Factors
from ...nn.parts import LINEARS
from ...ops import FIELDS, PANEL
from ...plan import PackedEncoderConfig
from ..checked_files import crc32_of
from .report import QuantizationReport, QuantizedRow, quantization_report

__all__ = ["METHOD", "Manifest", "WeightEntry", "save_quantized", "write_folder"]

#: ``quant_method`` of a folder's ``quantization_config``
METHOD = "filbert"
#: raised when the meaning of a folder changes, so that an old one is refused and not misread
FORMAT = 1
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
#: inputs of a unit of the layout
_UNIT = 32
_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class WeightEntry:
    """One quantized weight or embedding table of a folder.

    Attributes:
        bits: of a code.
        groups: along the inputs; 1 for a table.
        multiplier: its groups have one.
        zero: its groups have one.
        error: as of :class:`QuantizedRow`, for the report of the loaded model.
        of_results: likewise.
    """

    bits: int
    groups: int = 1
    multiplier: bool = False
    zero: bool = False
    error: float = 0.0
    of_results: float | None = None

    def shapes(self, outputs: int, inputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Suffix of a weight's tensor -> its dtype and shape."""
        panels = -(-outputs // PANEL)
        units = -(-inputs // _UNIT)
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "packed": (torch.uint8, (panels, units, 2 * _UNIT * self.bits)),
            "scale": (torch.float32, (outputs,)),
        }
        for name in ("multiplier", "zero"):
            if getattr(self, name):
                found[name] = (torch.uint8, (panels, self.groups, PANEL))
        return found

    def table_shapes(
        self, entries: int, width: int
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The same of an embedding table."""
        held = width if self.bits == 8 else -(-width // 2)
        return {
            "codes": (torch.uint8, (entries, held)),
            "scale": (torch.float32, (entries,)),
        }


@dataclass
class Manifest:
    """``quantization_config`` of a folder.

    Attributes:
        weights: name of a linear layer -> its weight.
        tables: name of an embedding -> its table.
        crc32: name of a tensor of the file -> CRC-32 of its bytes.
        method: how codes were chosen.
        settings: of the packed encoder.
        dtype: of the model.
    """

    weights: dict[str, WeightEntry] = field(default_factory=dict)
    tables: dict[str, WeightEntry] = field(default_factory=dict)
    crc32: dict[str, int] = field(default_factory=dict)
    method: str = ""
    settings: PackedEncoderConfig = field(default_factory=PackedEncoderConfig)
    dtype: torch.dtype = torch.float32

    def add(
        self, name: str, weight: GroupedWeight, error: float, of_results: float | None = None
    ) -> dict[str, Tensor]:
        """Names a weight, and gives its tensors by their names in the file."""
        self.weights[name] = WeightEntry(
            weight.bits, weight.groups, weight.multiplier is not None, weight.zero is not None,
            error, of_results,
        )  # fmt: skip
        return {f"{name}.{part}": t for part, t in weight.tensors().items()}

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``json.dump``."""

        def short(entries: Mapping[str, WeightEntry]) -> dict[str, Any]:
            # What is as by default is left out.
            plain = WeightEntry(0)
            return {
                name: {k: v for k, v in vars(entry).items() if v != getattr(plain, k)}
                for name, entry in entries.items()
            }

        return {
            "quant_method": METHOD, "format": FORMAT, "method": self.method,
            "dtype": str(self.dtype).removeprefix("torch."), "settings": self.settings.to_dict(),
            "weights": short(self.weights), "tables": short(self.tables), "crc32": self.crc32,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another method or format, or entries that make no weight.
        """
        if data.get("quant_method") != METHOD or data.get("format") != FORMAT:
            got = data.get("quant_method"), data.get("format")
            raise ValueError(
                f"quantization_config: got method and format {got}, need {(METHOD, FORMAT)}"
            )
        try:
            weights, tables = (
                {str(name): WeightEntry(**entry) for name, entry in data[key].items()}
                for key in ("weights", "tables")
            )
            settings = PackedEncoderConfig.from_dict(data["settings"])
            crc32 = {str(name): int(value) for name, value in data["crc32"].items()}
            dtype = _DTYPES[data["dtype"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"quantization_config: got entries that make no weight ({error}); try saving the "
                "model again with this version of filbert"
            ) from error
        for entries, known in ((weights, FIELDS), (tables, (4, 8))):
            for name, entry in entries.items():
                if entry.bits not in known or not isinstance(entry.groups, int) or entry.groups < 1:
                    raise ValueError(
                        f"quantization_config: got {entry.bits} bits in {entry.groups} groups for "
                        f"{name}, need {', '.join(map(str, known))} bits in 1 group or more"
                    )
        return cls(weights, tables, crc32, str(data.get("method", "")), settings, dtype)

    def report(self, nbytes: Mapping[str, int], inputs: Mapping[str, int]) -> QuantizationReport:
        """The report of a model that was loaded; arguments are by the names of weights."""
        rows = []
        for name, entry in (self.weights | self.tables).items():
            grouped = entry.multiplier or entry.zero
            group = inputs[name] // entry.groups if grouped else None
            rows.append(
                QuantizedRow(name, entry.bits, group, nbytes[name], entry.error, entry.of_results)
            )
        return QuantizationReport(rows, self.method)


def save_quantized(model: Any, folder: str | Path) -> None:
    """Writes a model of :func:`filbert.quantize` with the bits it has, as
    :func:`filbert.load_quantized` reads it.

    ``save_pretrained`` of such a model writes the float weights that its codes stand for; this
    writes the codes. A tokenizer is saved by itself, except that of a SentenceTransformer.

    ::

        filbert.save_quantized(model, "bert-4-bits")
        model = filbert.load_quantized("bert-4-bits")

    Args:
        model: a transformers model or a SentenceTransformer that :func:`filbert.quantize` made.
        folder: made if it is missing. Gets ``config.json`` and ``model.safetensors``, and of a
            SentenceTransformer all that its own ``save_pretrained`` writes.

    Raises:
        ValueError: no transformers model, or none that was quantized.
        RuntimeError: parameters that were written in place.
    """
    module, folder = module_of(model, "save_quantized"), Path(folder)
    if is_sentence_transformer(module):
        prefix, inner = next(
            (
                (name, m)
                for name, m in module.named_modules()
                if _has_config(m) and not is_sentence_transformer(m)
            ),
            ("", None),
        )
        if inner is None:
            raise ValueError("save_quantized: got a SentenceTransformer without a transformer")
        rows = _rows_of(module, prefix + ".")
        _manifest_of(inner, rows)  # refused before anything is written

        def write(path: str | Path, *args: Any, **kwargs: Any) -> None:
            _save_transformer(inner, Path(path), rows)

        # Its Transformer saves the model that it holds, and so the folder is as it should be.
        inner.__dict__["save_pretrained"] = write
        try:
            module.save_pretrained(str(folder))  # type: ignore[operator]
        finally:
            del inner.__dict__["save_pretrained"]
        return
    if not _has_config(module):
        raise ValueError(
            f"save_quantized: got a {type(module).__name__}, need a transformers model or a "
            "SentenceTransformer, whose config says how to make the model again"
        )
    _save_transformer(module, folder, _rows_of(module, ""))


def _has_config(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "save_pretrained")


#: the method of a report, and its rows by name
_Rows = tuple[str, dict[str, QuantizedRow]]


def _rows_of(model: nn.Module, prefix: str) -> _Rows:
    """Of the report of ``model``, those of the module whose names begin with ``prefix``."""
    try:
        report = quantization_report(model)
    except ValueError:
        return "", {}  # a copy has none
    return report.method, {row.name.removeprefix(prefix): row for row in report}


def _save_transformer(model: Any, folder: Path, rows: _Rows) -> None:
    manifest, tensors = _manifest_of(model, rows)
    seen: set[int] = set()
    with torch.no_grad():
        for name, t in model.state_dict().items():
            own = name.removesuffix(".weight")
            # A weight that has two names is stored once; transformers ties it again.
            if own not in manifest.weights and own not in manifest.tables:
                if t.data_ptr() not in seen or t.numel() == 0:
                    tensors[name] = t
                seen.add(t.data_ptr())
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    manifest.dtype = model.dtype
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    write_folder(folder, dict(sorted(config.items())), manifest, tensors)


def write_folder(
    folder: Path, config: dict[str, Any], manifest: Manifest, tensors: Mapping[str, Tensor]
) -> None:
    """Writes the two files of a folder.

    Args:
        folder: made if it is missing.
        config: of transformers.
        manifest: becomes ``quantization_config``, with the CRC-32 of ``tensors``.
        tensors: all there are.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    manifest.crc32 = {name: crc32_of(t) for name, t in held.items()}
    save_file(held, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    text = json.dumps({**config, "quantization_config": manifest.to_dict()}, indent=1)
    (folder / CONFIG_FILE).write_text(text + "\n")


def _manifest_of(model: nn.Module, known: _Rows) -> tuple[Manifest, dict[str, Tensor]]:
    """What of a model is quantized, and the tensors of that."""
    method, rows = known
    manifest = Manifest(method=method)
    tensors: dict[str, Tensor] = {}
    unknown = QuantizedRow("", 0, None, 0, 0.0, None)
    for name, module in model.named_modules():
        if isinstance(module, SwappedEncoder) and module.compressed is not None:
            manifest.settings = module.plan.settings
            for inner, weight in _weights_of(module, module.compressed):
                full = f"{name}.{inner}" if name else inner
                row = rows.get(full, unknown)
                tensors |= manifest.add(full, weight, row.error, row.of_results)
        elif isinstance(module, EmbeddingGrouped):
            error = rows.get(name, unknown).error
            manifest.tables[name] = WeightEntry(module.bits, error=error)
            tensors[f"{name}.codes"], tensors[f"{name}.scale"] = module.codes, module.scale
    if not manifest.weights:
        raise ValueError(
            f"save_quantized: got a {type(model).__name__} without weights of few bits; try "
            "filbert.quantize on it first"
        )
    return manifest, tensors


def _weights_of(
    encoder: SwappedEncoder, quantized: Sequence[CompressedParts]
) -> Iterator[tuple[str, GroupedWeight]]:
    """The weights of an encoder by the names of their linear layers in it."""
    names = {m: name for name, m in encoder.original.named_modules()}
    for linears, own in zip(encoder.linears, quantized, strict=True):
        if any(isinstance(weight, Factors) for weight in own.values()):
            raise ValueError(
                "save_quantized: the model has weights of low rank, need weights of few bits "
                "alone; try saving the model it came from"
            )
        for part, linear in zip(LINEARS, linears, strict=True):
            weight = own.get(part)
            if isinstance(weight, GroupedWeight):
                yield names[linear], weight
