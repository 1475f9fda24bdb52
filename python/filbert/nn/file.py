"""The file of a :class:`filbert.nn.BinaryBert`: one safetensors file of bits, scales and floats.

What follows from something else is not stored: totals from bits, integer thresholds from scales,
biases and float thresholds. They come out alike everywhere, being IEEE multiplications, additions
and comparisons. A scale that is the same for all outputs is stored once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .binary.bert import BinaryBert

__all__ = ["FORMAT", "file_parts", "load_binary", "save_binary"]

#: raised when the meaning of a file changes, so that an old one is refused and not misread. 2: the
#: softmax of attention in floats is rounded
FORMAT = 2
#: how bits lie in words; refused if it is another
LAYOUT = "bit k%32 of word k//32, low bits first; linear weights in tiles [N/16][K/32][16]"
_AGAIN = "try saving the model again with this version of filbert"


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


def file_parts(model: BinaryBert) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that :func:`save_binary` writes."""
    tensors = {}
    for name, t in model.state_dict().items():
        if name.endswith("alpha") and t.numel() > 1 and bool((t == t[0]).all()):
            t = t[:1]
        tensors[name] = t.detach().cpu().contiguous()
    about = {"format": FORMAT, "layout": LAYOUT, "config": model.to_config()}
    return tensors, {"filbert.binary": json.dumps(about, separators=(",", ":"))}


def save_binary(model: BinaryBert, path: str | Path) -> None:
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
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path}: got a folder, need the .safetensors file that BinaryBert.save wrote; a "
            "folder of BinarizedBert.save is read by BinarizedBert.load"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: No such file, need one that BinaryBert.save wrote")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            config = _config_of(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: got no whole safetensors file ({error}), need one that BinaryBert.save "
            "wrote; try copying it again"
        ) from error
    model = _empty(path, config, tensors)
    expected = model.state_dict()
    wrong = [
        f"{name} (got {_shape(tensors.get(name))}, need {_shape(t)})"
        for name, t in expected.items()
        if name not in tensors or not _fits(tensors[name], t, name)
    ] + [f"{name} (unknown)" for name in tensors if name not in expected]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit, first {'; '.join(wrong[:3])}")
    for name, t in tensors.items():
        tensors[name] = t.expand(expected[name].shape).contiguous()
    model.load_state_dict(tensors, assign=True)
    model.requires_grad_(False)
    model.derive()
    return model.to(device)


def _config_of(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The model's config from a file's ``metadata``."""
    text = (metadata or {}).get("filbert.binary")
    if text is None:
        raise ValueError(
            f"{path}: got a safetensors file without filbert's metadata, need one that "
            "BinaryBert.save wrote; try filbert.binarize on a checkpoint"
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
    if got not in (need, (1, LAYOUT)):
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
    return config


def _attends_in_floats(config: Mapping[str, Any]) -> bool:
    layers = config.get("layers")
    parts = [layer.get("attention") for layer in layers or () if isinstance(layer, dict)]
    return any(isinstance(part, dict) and part.get("kind") == "mixed" for part in parts)


def _empty(path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> BinaryBert:
    """A model of ``config`` for ``tensors``, made only if they are as large as it says."""
    try:
        wrong = [
            f"{name} (got {_shape(tensors.get(name))}, need {shape})"
            for name, shape in _large(config)
            if name not in tensors or tuple(tensors[name].shape) != shape
        ]
        model = None if wrong else BinaryBert.from_config(config)
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


def _large(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors of two dimensions or more."""
    tables = config["embeddings"]
    for name in ("position", "token_type"):
        yield f"embeddings.{name}", tuple(tables[name])
    for index, table in enumerate(tables["words"]):
        shape = (table["num_embeddings"], -(-table["features"] // 32))
        yield f"embeddings.words.{index}.weight", shape
    for index, layer in enumerate(config["layers"]):
        name = f"encoder.layers.{index}"
        for part in ("out", "up", "down"):
            yield from _bits(f"{name}.{part}", layer[part])
        for side, linear in enumerate(layer["attention"]["layers"]):
            yield from _bits(f"{name}.attention.layers.{side}", linear)
    if config["pooler"] is not None:
        yield from _bits("pooler", config["pooler"])
    if config["classifier"] is not None:
        yield "classifier.weight", tuple(config["classifier"])


def _bits(name: str, linear: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The weights of a linear layer, or of the terms of a sum of them."""
    if "terms" in linear:
        for index, term in enumerate(linear["terms"]):
            yield from _bits(f"{name}.terms.{index}", term)
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
