"""Files of packed modules: one safetensors file of bits, scales and floats.

What follows from something else is not stored: totals from bits, integer thresholds from scales,
biases and float thresholds, and layouts from dense weights. They come out alike everywhere, being
IEEE multiplications, additions and comparisons. A scale that is the same for all outputs is stored
once. The metadata hold the format and a config, from which :mod:`filbert.nn.kinds` builds modules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .binary.bert import BinaryBert
from .encoder import PackedEncoder

__all__ = ["FORMAT", "file_parts", "load_binary", "load_encoder", "save"]

#: raised when the meaning of a file changes, so that an old one is refused and not misread. 2: the
#: softmax of attention in floats is rounded. 3: layers of slots, each of its own kind
FORMAT = 3
#: how bits lie in words; refused if it is another
LAYOUT = "bit k%32 of word k//32, low bits first; linear weights in tiles [N/16][K/32][16]"
_AGAIN = "try saving the model again with this version of filbert"
#: what a file is of -> the key of its metadata, what wrote it, and where else one comes from
_ROOTS: dict[type, tuple[str, str, str]] = {
    BinaryBert: ("filbert.binary", "BinaryBert.save", "filbert.binarize on a checkpoint"),
    PackedEncoder: ("filbert.encoder", "PackedEncoder.save", "filbert.convert on a model"),
}


def _root_of(model: BinaryBert | PackedEncoder) -> type:
    return BinaryBert if isinstance(model, BinaryBert) else PackedEncoder


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "binary models are saved as safetensors, which is not installed; try pip install "
            "safetensors"
        ) from error
    return safetensors


def file_parts(
    model: BinaryBert | PackedEncoder,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that :func:`save` writes."""
    tensors = {}
    # The layers' own: a swapped encoder's dictionary speaks for the model it came from.
    own = model if isinstance(model, BinaryBert) else model.packed_layers
    prefix = "" if own is model else "packed_layers."
    for name, t in own.state_dict(prefix=prefix).items():
        if name.endswith("alpha") and t.numel() > 1 and bool((t == t[0]).all()):
            t = t[:1]
        tensors[name] = t.detach().cpu().contiguous()
    about = {"format": FORMAT, "layout": LAYOUT, "config": model.to_config()}
    key = _ROOTS[_root_of(model)][0]
    return tensors, {key: json.dumps(about, separators=(",", ":"))}


def save(model: BinaryBert | PackedEncoder, path: str | Path) -> None:
    """Writes ``model`` to one ``.safetensors`` file, in a folder that is made if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors, metadata = file_parts(model)
    _safetensors().torch.save_file(tensors, str(path), metadata)


def load_binary(path: str | Path, device: torch.device | str = "cpu") -> BinaryBert:
    """Reads what :meth:`filbert.nn.BinaryBert.save` wrote. Needs no transformers.

    Args:
        path: a ``.safetensors`` file.
        device: where the model goes.

    Returns:
        The model in eval mode; it gives bit for bit what the saved one did.

    Raises:
        OSError: no such file.
        ValueError: a file of something else, of another format, or with tensors that do not fit.
    """
    model: BinaryBert = _load(BinaryBert, path, device)
    return model


def load_encoder(path: str | Path, device: torch.device | str = "cpu") -> PackedEncoder:
    """Reads what :meth:`filbert.nn.PackedEncoder.save` wrote; arguments and errors are those of
    :func:`load_binary`. Dense weights are packed for ``device``; rows keep the dtype they had."""
    encoder: PackedEncoder = _load(PackedEncoder, path, device)
    return encoder


def _load(root: type, path: str | Path, device: torch.device | str) -> Any:
    path = Path(path)
    _, wrote, _ = _ROOTS[root]
    if path.is_dir():
        raise ValueError(
            f"{path}: got a folder, need the .safetensors file that {wrote} wrote; a "
            "folder of BinarizedBert.save is read by BinarizedBert.load"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: No such file, need one that {wrote} wrote")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            format_of, config = _config_of(root, path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: got no whole safetensors file ({error}), need one that {wrote} "
            "wrote; try copying it again"
        ) from error
    if format_of < 3:
        tensors = {_name_of_today(name): t for name, t in tensors.items()}
    model = _empty(root, path, config, tensors, format_of)
    expected = model.state_dict()
    wrong = [
        f"{name} (got {_shape(tensors.get(name))}, need {_shape(t)})"
        for name, t in expected.items()
        if name not in tensors or not _fits(tensors[name], t, name)
    ] + [f"{name} (unknown)" for name in tensors if name not in expected]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit, first {'; '.join(wrong[:3])}")
    for name, t in tensors.items():
        tensors[name] = t.expand(expected[name].shape).contiguous().to(device)
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    model.eval()
    # Tensors that are in no file are where the model was made.
    for module in model.modules():
        for name, t in module._buffers.items():
            if t is not None and name in module._non_persistent_buffers_set:
                module._buffers[name] = t.to(device)
    model.derive()
    return model


def _config_of(
    root: type, path: Path, metadata: Mapping[str, str] | None
) -> tuple[int, dict[str, Any]]:
    """The format and the config from a file's ``metadata``."""
    key, wrote, source = _ROOTS[root]
    text = (metadata or {}).get(key)
    if text is None:
        raise ValueError(
            f"{path}: got a safetensors file without filbert's metadata, need one that "
            f"{wrote} wrote; try {source}"
        )
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got metadata that is no JSON ({error}); {_AGAIN}") from error
    if not isinstance(about, dict):
        kind = type(about).__name__
        raise ValueError(f"{path}: got a {kind} as metadata, need a dict; {_AGAIN}")
    config = about.get("config")
    first = about.get("format") == 1
    got, need = (about.get("format"), about.get("layout")), (FORMAT, LAYOUT)
    if got not in (need, (2, LAYOUT), (1, LAYOUT)):
        raise ValueError(f"{path}: got format and layout {got}, need {need}; {_AGAIN}")
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise ValueError(f"{path}: got a {kind} as config, need a dict; {_AGAIN}")
    if first and _attends_in_floats(config):
        raise ValueError(
            f"{path}: got format 1 of a model whose attention is in floats, need format {FORMAT}: "
            "the softmax was not rounded then, as BinaryBERT's is; try filbert.binarize on its "
            "checkpoint again"
        )
    return int(about["format"]), config


def _name_of_today(name: str) -> str:
    """A tensor's name of formats 1 and 2, whose layers had six parts and no slots."""
    name = re.sub(
        r"^encoder\.layers\.(\d+)\.(up|down)\.", r"encoder.layers.\1.feed_forward.\2.", name
    )
    return re.sub(r"^encoder\.layers\.", "encoder.packed_layers.", name)


def _config_of_today(config: dict[str, Any]) -> dict[str, Any]:
    """The config of formats 1 and 2 as it is written now."""

    def linear(old: dict[str, Any]) -> dict[str, Any]:
        if "terms" in old:
            return {"kind": "binary_sum", "terms": [linear(term) for term in old["terms"]]}
        return {"kind": "binary", **old}

    def layer(old: dict[str, Any]) -> dict[str, Any]:
        attention = old["attention"]
        sides = [linear(side) for side in attention["layers"]]
        return {
            "attention": {**attention, "layers": sides},
            "out": linear(old["out"]),
            "feed_forward": {
                "kind": "binary", "up": linear(old["up"]), "down": linear(old["down"]),
                "activation": old["activation"],
            },
            "eps": old["eps"],
        }  # fmt: skip

    rest = {name: value for name, value in config.items() if name != "layers"}
    layers = [layer(old) for old in config["layers"]]
    encoder = {"layers": layers, "masked_rows": "zero", "model_dtype": None}
    pooler = None if config["pooler"] is None else linear(config["pooler"])
    return {**rest, "encoder": encoder, "pooler": pooler}


def _attends_in_floats(config: Mapping[str, Any]) -> bool:
    layers = config.get("layers")
    parts = [layer.get("attention") for layer in layers or () if isinstance(layer, dict)]
    return any(isinstance(part, dict) and part.get("kind") == "mixed" for part in parts)


def _empty(
    root: Any, path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], format_of: int
) -> Any:
    """A model of ``config`` for ``tensors``, made only if they are as large as it says."""
    try:
        if format_of < 3:
            config = _config_of_today(config)
        shapes = _large_of_bert(config) if root is BinaryBert else _large_of_encoder("", config)
        wrong = [
            f"{name} (got {_shape(tensors.get(name))}, need {shape})"
            for name, shape in shapes
            if name not in tensors or tuple(tensors[name].shape) != shape
        ]
        model = None if wrong else root.from_config(config)
    except KeyError as error:
        raise ValueError(f"{path}: got a config without {error}; {_AGAIN}") from error
    except (
        ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError,
        AssertionError,
    ) as error:  # fmt: skip
        raise ValueError(f"{path}: got a config that makes no model ({error}); {_AGAIN}") from error
    if model is None:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit, first {'; '.join(wrong[:3])}")
    return model


#: names and shapes of all tensors of two dimensions or more
_Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _large_of_bert(config: Mapping[str, Any]) -> _Shapes:
    tables = config["embeddings"]
    for name in ("position", "token_type"):
        yield f"embeddings.{name}", tuple(tables[name])
    for index, table in enumerate(tables["words"]):
        shape = (table["num_embeddings"], -(-table["features"] // 32))
        yield f"embeddings.words.{index}.weight", shape
    yield from _large_of_encoder("encoder.", config["encoder"])
    if config["pooler"] is not None:
        yield from _large_of_linear("pooler", config["pooler"])
    if config["classifier"] is not None:
        yield "classifier.weight", tuple(config["classifier"])


def _large_of_encoder(prefix: str, config: Mapping[str, Any]) -> _Shapes:
    for index, layer in enumerate(config["layers"]):
        name = f"{prefix}packed_layers.{index}"
        yield from _large_of_linear(f"{name}.out", layer["out"])
        for part in ("up", "down"):
            yield from _large_of_linear(f"{name}.feed_forward.{part}", layer["feed_forward"][part])
        attention = layer["attention"]
        if attention["kind"] in ("dense", "lowrank"):
            split = len(attention["linears"]) == 2
            names = ("query", "key_value") if split else ("query_key_value",)
            sides = list(zip(names, attention["linears"], strict=True))
        else:
            sides = [(f"layers.{i}", side) for i, side in enumerate(attention["layers"])]
        for side, linear in sides:
            yield from _large_of_linear(f"{name}.attention.{side}", linear)


def _large_of_linear(name: str, linear: Mapping[str, Any]) -> _Shapes:
    """The weight of a linear layer, or those of the terms of a sum."""
    if linear["kind"] == "binary_sum":
        for index, term in enumerate(linear["terms"]):
            yield from _large_of_linear(f"{name}.terms.{index}", term)
    elif linear["kind"] == "dense":
        yield f"{name}.weight", (sum(linear["sizes"]), linear["in_features"])
    elif linear["kind"] == "grouped":
        panels, units = -(-sum(linear["sizes"]) // 16), -(-linear["in_features"] // 32)
        yield f"{name}.packed", (panels, units, 64 * linear["bits"])
    elif linear["kind"] == "lowrank_grouped":
        for part in ("first", "second"):
            yield from _large_of_linear(f"{name}.{part}", linear[part])
    elif linear["kind"] == "lowrank":
        outputs, rank, inputs = sum(linear["sizes"]), linear["rank"], linear["in_features"]
        for factor, rows, width in (("a", rank, inputs), ("b", outputs, rank)):
            pairs = linear["weight_dtype"] == "bfloat16"
            steps = (-(-width // 2), 16, 2) if pairs else (width, 16)
            yield f"{name}.{factor}", (-(-rows // 16), *steps)
    else:
        words = -(-linear["packer"]["features"] // 32)
        yield f"{name}.weight", (-(-linear["out_features"] // 16), words, 16)


def _fits(got: Tensor, need: Tensor, name: str) -> bool:
    """Whether ``got`` can be loaded; the dtype of float rows may be another one."""
    once = name.endswith("alpha") and got.shape == (1,)
    kind = got.dtype == need.dtype or (got.is_floating_point() and need.is_floating_point())
    return kind and (once or got.shape == need.shape)


def _shape(t: Tensor | None) -> str:
    return "nothing" if t is None else f"{t.dtype} {tuple(t.shape)}"
