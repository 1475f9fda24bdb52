"""Models of low rank on disk: factors in a safetensors file, and what they are in ``config.json``.

A folder has the ``config.json`` of a transformers model with one more key, ``low_rank``: which
weights have factors, the plan of the encoders, and a CRC-32 of every tensor. Query, key and value
are one weight, under the query's name::

    NAME.a   [R, K]      NAME.b   [N, R]

Of few bits each of the two is the tensors of a grouped weight, ``NAME.a.packed`` and so on, and the
entry of the weight in ``config.json`` has ``bits``.

Everything else is stored as transformers does it, in a file of another name, so that nobody who
does not know factors loads the rest and believes that it is a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...conversion.hugging_face.holders import module_of
from ...conversion.in_place import convert_compressed, encoders_of
from ...conversion.swap import SwappedEncoder
from ...nn.build import JOINT, CompressedParts
from ...nn.grouped.weight import GroupedWeight
from ...nn.lowrank.factors import Factors, GroupedFactors
from ...nn.parts import LINEARS
from ...plan import EncoderPlan
from ..checked_files import crc32_of, verify
from .report import FactorizationReport, FactorizedRow, factorization_report

__all__ = ["load_factorized", "save_factorized"]

KEY, FORMAT = "low_rank", 1
WEIGHTS_FILE, CONFIG_FILE = "factors.safetensors", "config.json"
#: the layers whose weights a part's factors stand for
_OF = {JOINT: ("query", "key", "value")}


def save_factorized(model: Any, folder: str | Path) -> None:
    """Writes a model of :func:`filbert.factorize` with its factors, as
    :func:`filbert.load_factorized` reads it.

    ``save_pretrained`` of such a model writes the products of the factors; this writes the factors.
    A tokenizer is saved by itself.

    Args:
        model: a transformers model that :func:`filbert.factorize` made.
        folder: made if it is missing; gets ``config.json`` and ``factors.safetensors``.

    Raises:
        ValueError: no transformers model, or one without factors, or with weights of few bits.
        RuntimeError: parameters that were written in place.
    """
    module, folder = module_of(model, "save_factorized"), Path(folder)
    if not hasattr(getattr(module, "config", None), "to_json_string"):
        raise ValueError(
            f"save_factorized: got a {type(module).__name__}, need a transformers model, whose "
            "config says how to make it again"
        )
    weights: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    plan = None
    for name, encoder in module.named_modules():
        if isinstance(encoder, SwappedEncoder) and encoder.compressed is not None:
            plan = encoder.plan
            names = {m: inner for inner, m in encoder.original.named_modules()}
            for index, own in enumerate(encoder.compressed):
                linears = dict(zip(LINEARS, encoder.linears[index], strict=True))
                for part, factors in own.items():
                    if isinstance(factors, GroupedWeight):
                        raise ValueError(
                            "save_factorized: the model has weights of few bits, need weights of "
                            "low rank alone; try filbert.save_quantized"
                        )
                    of = [names[linears[one]] for one in _OF.get(part, (part,))]
                    full = [f"{name}.{inner}" if name else inner for inner in of]
                    weights[full[0]] = {
                        "encoder": name, "layer": index, "part": part, "linears": full,
                    }  # fmt: skip
                    if isinstance(factors, GroupedFactors):
                        weights[full[0]]["bits"] = factors.a.bits
                    tensors |= _tensors_of(full[0], factors)
    if plan is None or not weights:
        raise ValueError(
            f"save_factorized: got a {type(module).__name__} without weights of low rank; try "
            "filbert.factorize on it first"
        )
    gone = {f"{linear}.weight" for entry in weights.values() for linear in entry["linears"]}
    seen: set[int] = set()
    for name, t in module.state_dict().items():
        # A weight that has two names is stored once; transformers ties it again.
        if name not in gone and (t.data_ptr() not in seen or t.numel() == 0):
            tensors[name] = t
        seen.add(t.data_ptr())
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    config: dict[str, Any] = json.loads(module.config.to_json_string(use_diff=True))  # type: ignore[operator, union-attr]
    config["architectures"] = [type(module).__name__]
    config["dtype"] = str(module.dtype).removeprefix("torch.")
    config[KEY] = {
        "format": FORMAT, "plan": plan.to_dict(), "weights": weights, "report": _rows_of(module),
        "crc32": {name: crc32_of(t) for name, t in held.items()},
    }  # fmt: skip
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")


def _tensors_of(name: str, factors: Factors | GroupedFactors) -> dict[str, Tensor]:
    """The tensors of a weight, by their names in the file."""
    if isinstance(factors, Factors):
        return {f"{name}.a": factors.a, f"{name}.b": factors.b}
    return {
        f"{name}.{side}.{part}": t
        for side in ("a", "b")
        for part, t in getattr(factors, side).tensors().items()
    }


def _factors_of(
    name: str, entry: Mapping[str, Any], state: dict[str, Tensor], sizes: tuple[int, int]
) -> Factors | GroupedFactors:
    """The inverse of :func:`_tensors_of`, which takes them out of ``state``; sizes are N and K."""
    if "bits" not in entry:
        return Factors(state.pop(f"{name}.a"), state.pop(f"{name}.b"))

    def side(which: str, outputs: int, inputs: int) -> GroupedWeight:
        parts = {
            part: state.pop(f"{name}.{which}.{part}", None)
            for part in ("packed", "scale", "multiplier", "zero")
        }
        made = GroupedWeight(
            bits=entry["bits"],
            outputs=outputs,
            inputs=inputs,
            **parts,  # type: ignore[arg-type]
        )
        made.totals()  # no sum of it can exceed int32, whatever the file says
        return made

    rank = len(state[f"{name}.a.scale"])
    return GroupedFactors(side("a", rank, sizes[1]), side("b", sizes[0], rank))


def _rows_of(model: nn.Module) -> list[dict[str, Any]]:
    try:
        return [asdict(row) for row in factorization_report(model).rows]
    except ValueError:
        return []  # a copy has no report


def load_factorized(folder: str | Path, *, device: torch.device | str = "cpu") -> Any:
    """Reads what :func:`filbert.save_factorized` wrote.

    Every tensor is compared with the CRC-32 that was saved. The products of the factors exist for a
    moment while the encoders are packed.

    Args:
        folder: of a transformers model.
        device: where the model goes.

    Returns:
        A transformers model of the class that was saved, in eval mode, and the same to the bit.

    Raises:
        OSError: no such folder or file.
        ValueError: a folder of something else, of another format, or a tensor that is cut off,
            missing or damaged, with its name.
    """
    import transformers
    from safetensors.torch import load_file

    folder = Path(folder)
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    own = config.pop(KEY, None)
    if not isinstance(own, dict) or own.get("format") != FORMAT:
        got = None if own is None else own.get("format")
        raise ValueError(
            f"{folder}: got {KEY} of format {got}, need {FORMAT}, as filbert.save_factorized writes"
        )
    verify(folder / WEIGHTS_FILE, own["crc32"])
    state = load_file(str(folder / WEIGHTS_FILE))
    plan, weights = EncoderPlan.from_dict(own["plan"]), own["weights"]
    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class.from_dict(config)).to(getattr(torch, config["dtype"])).eval()
    factors = {}
    for name, entry in weights.items():
        of = [model.get_submodule(linear) for linear in entry["linears"]]
        sizes = sum(linear.out_features for linear in of), of[0].in_features
        factors[name] = _factors_of(name, entry, state, sizes)
    state |= _products(model, factors, weights)
    missing, unknown = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unknown or (missing := [name for name in missing if name not in tied]):
        raise ValueError(f"{folder}: got unknown tensors {unknown}, and {missing} are missing")
    model = model.to(device)
    encoders = dict(encoders_of(model))
    made: dict[nn.Module, list[CompressedParts]] = {}
    for name, entry in weights.items():
        encoder = encoders[entry["encoder"]]
        layers = made.setdefault(encoder, [{} for _ in range(_count(entry["encoder"], weights))])
        layers[entry["layer"]][entry["part"]] = factors[name].to(device)
    for parts in made.values():
        parts += [{} for _ in range(model.config.num_hidden_layers - len(parts))]
    convert_compressed(model, plan, True, made)
    FactorizationReport([FactorizedRow(**row) for row in own["report"]]).attach(model)
    return model


def _count(encoder: str, weights: Mapping[str, dict[str, Any]]) -> int:
    """How many layers of an encoder are named."""
    return 1 + max(entry["layer"] for entry in weights.values() if entry["encoder"] == encoder)


def _products(
    model: nn.Module,
    factors: Mapping[str, Factors | GroupedFactors],
    weights: Mapping[str, dict[str, Any]],
) -> dict[str, Tensor]:
    """The weights of linear layers that factors stand for, by their names."""
    found = {}
    for name, entry in weights.items():
        held = factors[name]
        if isinstance(held, Factors):
            held = Factors(held.a.float(), held.b.float())
        whole = held.weight.to(next(model.parameters()).dtype)
        linears = [model.get_submodule(linear) for linear in entry["linears"]]
        sizes = [int(linear.out_features) for linear in linears]  # type: ignore[arg-type]
        for linear, part in zip(entry["linears"], whole.split(sizes), strict=True):
            found[f"{linear}.weight"] = part
    return found
