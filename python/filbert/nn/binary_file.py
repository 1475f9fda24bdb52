"""The file of a :class:`filbert.nn.BinaryBert`: one safetensors file of bits, scales and floats.

What follows from something else is not stored: totals from bits, integer thresholds from scales,
biases and float thresholds. They come out alike everywhere, being IEEE multiplications, additions
and comparisons. A scale that is the same for all outputs is stored once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .binary_encoder import BinaryBert

__all__ = ["FORMAT", "file_parts", "load_binary", "save_binary"]

#: raised when the meaning of a file changes, so that an old one is refused and not misread
FORMAT = 1
#: how bits lie in words; refused if it is another
LAYOUT = "bit k%32 of word k//32, low bits first; linear weights in tiles [N/16][K/32][16]"


def _safetensors() -> Any:
    try:
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
    about = {"format": FORMAT, "layout": LAYOUT, "config": model.config()}
    return tensors, {"filbert.binary": json.dumps(about, separators=(",", ":"))}


def save_binary(model: BinaryBert, path: str | Path) -> None:
    """Writes ``model`` to one ``.safetensors`` file."""
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
    with _safetensors().safe_open(str(path), framework="pt", device="cpu") as file:
        about = (file.metadata() or {}).get("filbert.binary")
        if about is None:
            raise ValueError(
                f"{path}: got a safetensors file without filbert's metadata, need one that "
                "BinaryBert.save wrote; try filbert.binarize on a checkpoint"
            )
        about = json.loads(about)
        got, need = (about.get("format"), about.get("layout")), (FORMAT, LAYOUT)
        if got != need:
            raise ValueError(f"{path}: got format and layout {got}, need {need}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = BinaryBert.from_config(about["config"])
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


def _fits(got: Tensor, need: Tensor, name: str) -> bool:
    """Whether ``got`` can be loaded; the dtype of float rows may be another one."""
    once = name.endswith("alpha") and got.shape == (1,)
    kind = got.dtype == need.dtype or (got.is_floating_point() and need.is_floating_point())
    return kind and (once or got.shape == need.shape)


def _shape(t: Tensor | None) -> str:
    return "nothing" if t is None else f"{t.dtype} {tuple(t.shape)}"
