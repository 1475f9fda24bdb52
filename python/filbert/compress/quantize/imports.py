"""`import_quantized`: weights that other tools quantized, as a folder of filbert.

GPTQ checkpoints (AutoGPTQ, GPTQModel) store codes along the inputs, compressed-tensors'
``pack-quantized`` along each output. Both are streams of bits, low ones first, cut into 32-bit
words; older compressed-tensors let no code lie in two words.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...nn.grouped.weight import GroupedWeight
from ...ops import FIELDS, GROUP_SIZES
from .checkpoint import CONFIG_FILE, Manifest, write_folder
from .report import error_of

__all__ = ["import_quantized"]

_WORD = 32


@dataclass(frozen=True)
class _Imported:
    """What a checkpoint says of a weight: ``step[n, g] * (code[n, k] - zero[n, g])``."""

    codes: Tensor  # int32 [N, K]
    bits: int
    steps: Tensor  # float32 [N, G]
    zeros: Tensor  # int32 [N, G]

    def numbers(self) -> Tensor:
        repeats = self.codes.shape[1] // self.steps.shape[1]
        steps, zeros = (t.repeat_interleave(repeats, 1) for t in (self.steps, self.zeros))
        return (self.codes - zeros).float() * steps


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of a stream of bits.

    Args:
        words: int32 ``[R, W]``, each row a stream.
        bits: of a code.
        count: codes of a row. Where ``W`` words hold so many only if codes may lie in two words,
            they do; else each word has ``32 // bits`` of its own.

    Returns:
        int32 ``[R, count]``.

    Raises:
        ValueError: another number of words.
    """
    dense, apart = -(-count * bits // _WORD), -(-count // (_WORD // bits))
    if words.shape[1] not in (dense, apart):
        raise ValueError(f"got {words.shape[1]} words, need {dense} for {count} codes of {bits}")
    wide = words.to(torch.int64) & 0xFFFFFFFF
    at = torch.arange(count)
    if words.shape[1] != dense:
        per = _WORD // bits
        return (wide[:, at // per] >> (bits * (at % per)) & ((1 << bits) - 1)).to(torch.int32)
    first = at * bits
    word, shift = first // _WORD, first % _WORD
    low = wide[:, word] >> shift
    # The next word, of which a code that ends in the first needs nothing.
    high = wide[:, (word + 1).clamp(max=words.shape[1] - 1)] << (_WORD - shift)
    return ((low | high) & ((1 << bits) - 1)).to(torch.int32)


def _check_order(name: str, index: Tensor | None, size: int) -> None:
    """Raises ValueError unless each input's group is that of ``size`` neighbours."""
    if index is not None and not torch.equal(index.long(), torch.arange(len(index)) // size):
        raise ValueError(
            f"{name}: got inputs in an order of their own, need groups of neighbours; try "
            "quantizing without desc_act or actorder"
        )


def _gptq(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> _Imported:
    bits = int(config["bits"])
    scales = tensors[f"{name}.scales"].float().T.contiguous()
    outputs, groups = scales.shape
    qweight = tensors[f"{name}.qweight"]
    inputs = qweight.shape[0] * _WORD // bits
    _check_order(name, tensors.get(f"{name}.g_idx"), inputs // groups)
    codes = unpack_stream(qweight.T, bits, inputs)
    zeros = unpack_stream(tensors[f"{name}.qzeros"], bits, outputs).T
    if config.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1  # the first version of the format stores one less
    return _Imported(codes, bits, scales, zeros)


def _pack_quantized(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> _Imported:
    scheme = _scheme_of(name, config)
    bits = int(scheme["num_bits"])
    if scheme.get("type", "int") != "int":
        raise ValueError(f"{name}: got weights of type {scheme['type']!r}, need 'int'")
    outputs, inputs = (int(size) for size in tensors[f"{name}.weight_shape"])
    scale = tensors[f"{name}.weight_scale"].float()
    steps = scale.reshape(scale.shape[0] if scale.ndim else 1, -1).expand(outputs, -1)
    _check_order(name, tensors.get(f"{name}.weight_g_idx"), inputs // steps.shape[1])
    codes = unpack_stream(tensors[f"{name}.weight_packed"], bits, inputs)
    packed = tensors.get(f"{name}.weight_zero_point")
    if packed is None:
        zeros = torch.full(steps.shape, 1 << (bits - 1), dtype=torch.int32)
    elif packed.dtype == torch.int32:
        zeros = unpack_stream(packed.T, bits, outputs).T
    else:
        zeros = packed.to(torch.int32).reshape(packed.shape[0], -1) + (1 << (bits - 1))
    return _Imported(codes, bits, steps, zeros.expand(steps.shape))


def _scheme_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a weight: of the first group with a target that is its name, a pattern that
    fits it, or its class."""
    for group in config["config_groups"].values():
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            fits = re.match(pattern, name) if target.startswith("re:") else target == name
            if fits or target == "Linear":
                weights: Mapping[str, Any] = group["weights"]
                return weights
    raise ValueError(f"{name}: no group of the quantization_config has it as a target")


#: quant_method -> the suffix by which a weight is known, all its suffixes, and what reads it
_READERS: dict[
    str,
    tuple[
        str,
        tuple[str, ...],
        Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], _Imported],
    ],
] = {
    "gptq": (".qweight", (".qweight", ".qzeros", ".scales", ".g_idx"), _gptq),
    "compressed-tensors": (
        ".weight_packed",
        (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
        _pack_quantized,
    ),
}


def fit_multipliers(steps: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """``steps`` ``[N, G]`` as a scale for each output times integers from 1 to ``most``: of the
    scales that make the largest step a multiplier of half of ``most`` or more, the one with the
    least squared error relative to the steps.

    Returns:
        float32 ``[N]`` and uint8 ``[N, G]``.
    """
    largest = steps.amax(1)
    safe = torch.where(largest > 0, largest, 1.0)
    ratio = steps / safe[:, None]
    best = torch.full_like(largest, torch.inf)
    top = torch.ones_like(largest)
    for candidate in range(max(1, most // 2), most + 1):
        multiplier = (ratio * candidate).round().clamp(1, most)
        off = (multiplier / candidate / ratio.clamp(min=1e-30) - 1).clamp(max=1e6)
        error = off.square().sum(1)
        better = error < best
        best, top = torch.where(better, error, best), torch.where(better, float(candidate), top)
    multiplier = (ratio * top[:, None]).round().clamp(1, most).to(torch.uint8)
    return largest / top, multiplier


def _grouped(name: str, held: _Imported, offsets: bool) -> tuple[GroupedWeight, float]:
    """A weight as the kernels have it, and what that changed of its numbers."""
    if held.bits not in FIELDS:
        raise ValueError(f"{name}: got {held.bits} bits, need one of {', '.join(map(str, FIELDS))}")
    inputs = held.codes.shape[1]
    groups = held.steps.shape[1]
    size = inputs // groups if inputs % groups == 0 else 0
    if groups > 1 and size not in GROUP_SIZES:
        # Larger ones are several of the largest.
        largest = max(GROUP_SIZES)
        if not size or size % largest:
            raise ValueError(
                f"{name}: got groups of {inputs / groups:g} inputs, need "
                f"{', '.join(map(str, GROUP_SIZES))}, a multiple of {largest}, or all {inputs}"
            )
        split = [t.repeat_interleave(size // largest, 1) for t in (held.steps, held.zeros)]
        return _grouped(name, _Imported(held.codes, held.bits, *split), offsets)
    if not bool((held.steps.isfinite() & (held.steps >= 0)).all()):
        raise ValueError(f"{name}: got scales that are negative or not finite")
    span = (1 << held.bits) - 1
    zeros = held.zeros.clamp(0, span)
    scale, multiplier = held.steps[:, 0], None
    if groups > 1:
        reach = span if offsets else 1 << (held.bits - 1)
        most = max(1, min(255, (2**31 - 1) // (255 * inputs * reach)))
        scale, multiplier = fit_multipliers(held.steps, most)
    numbers = held.numbers()
    # Codes are chosen again for the steps there are: mostly the same ones.
    step = scale[:, None] if multiplier is None else scale[:, None] * multiplier.float()
    repeats = inputs // groups
    wide, zero = (t.repeat_interleave(repeats, 1) for t in (step, zeros))
    levels = torch.where(wide > 0, numbers / wide, 0.0).round() + zero
    made = GroupedWeight.from_codes(
        levels.clamp(0, span).to(torch.uint8), held.bits, scale, multiplier,
        zeros.to(torch.uint8) if offsets else None,
    )  # fmt: skip
    return made, error_of(made.dequantize(), numbers)


def _tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: No .safetensors file")
    for path in files:
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: got no whole safetensors file ({error})") from error


def import_quantized(source: str | Path, target: str | Path) -> None:
    """Writes a checkpoint of GPTQ or compressed-tensors as a folder of filbert.

    Weights keep their bits, groups and zeros. Scales of groups become integers times one scale for
    each output, which moves steps a little, most where bits are many; the report of the loaded
    model says by how much the numbers of each weight have changed. What the model computes changes
    more: rows become 8-bit codes here and stay floats there.

    ::

        filbert.import_quantized("bert-base-gptq", "bert-4-bits")
        model = filbert.load_quantized("bert-4-bits")

    Args:
        source: a folder of a BERT-shaped transformers model whose ``quantization_config`` is that
            of ``"gptq"`` or of ``"compressed-tensors"`` in the format ``"pack-quantized"``.
        target: the folder to write, another one. All small files, such as a tokenizer's, are
            copied.

    Raises:
        OSError: no such folder or file.
        ValueError: another method or format, bits or groups that filbert has no kernels for, or
            inputs in an order of their own (``desc_act``); weights are named.

    Paper: GPTQ, arXiv 2210.17323.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise ValueError(f"target: got the folder of the source, {source}, need another one")
    config = json.loads((source / CONFIG_FILE).read_text())
    about = config.pop("quantization_config", None) or {}
    method = about.get("quant_method")
    if method not in _READERS:
        raise ValueError(
            f"{source}: got quantization method {method!r}, need one of {tuple(_READERS)}"
        )
    if method == "compressed-tensors" and about.get("format") != "pack-quantized":
        raise ValueError(f"{source}: got format {about.get('format')!r}, need 'pack-quantized'")
    known, suffixes, read = _READERS[method]
    tensors = dict(_tensors_of(source))
    names = [name.removesuffix(known) for name in tensors if name.endswith(known)]
    if not names:
        raise ValueError(f"{source}: no tensor is called *{known}, as weights of {method} are")
    imported = {}
    for name in names:
        try:
            imported[name] = read(name, tensors, about)
        except KeyError as error:
            raise ValueError(f"{source}: no {error} for the weight {name}") from error
        except ValueError as error:
            who = "" if name in str(error) else f"{name}: "
            raise ValueError(f"{source}: {who}{error}") from error
    # Query, key and value become one weight, so they have offsets together or not at all.
    offsets = any(bool((held.zeros != 1 << (held.bits - 1)).any()) for held in imported.values())
    manifest = Manifest(method=method)
    written: dict[str, Tensor] = {}
    for name, held in imported.items():
        weight, moved = _grouped(name, held, offsets)
        written |= manifest.add(name, weight, moved)
    gone = {name + suffix for name in names for suffix in suffixes}
    written |= {name: t for name, t in tensors.items() if name not in gone}
    write_folder(target, config, manifest, written)
    for path in source.iterdir():
        weights = path.suffix in (".safetensors", ".bin") or path.name.endswith(".index.json")
        if path.is_file() and path.name != CONFIG_FILE and not weights:
            shutil.copy2(path, target / path.name)
