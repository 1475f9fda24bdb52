"""What the configs of the published codes say, field by field: what a packed model can be made of,
and what it cannot.

A field that the code does not read is not looked at: dropouts, ``initializer_range``, BiBERT's
``clip_val``, ``embedding_bits`` and ``hidden_act`` (it always computes GELU), ``clip_init_val`` of
learned scales. A field that decides something is read right or refused.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .latent import LatentBert

__all__ = ["FIXED_EPS", "batch_dependence", "unlike_the_weights", "unread_right"]

#: epsilon of every LayerNorm of BiT's and BinaryBERT's code, whatever ``layer_norm_eps`` says
FIXED_EPS = 1e-12


class _Need(NamedTuple):
    """What a field must be, if it is there."""

    values: tuple[Any, ...]
    why: str


_ONE_BIT = _Need((1,), "weights of more bits have no operator; try its one-bit checkpoint")
_LAYERWISE = _Need((True,), "its code refuses a scale for each row; try the config it was run with")
_LEARNED = _Need((True,), "its code refuses fixed scales; try the config it was run with")
_SIGNED = _Need(
    (True,),
    "{0, a} for queries, keys, values and the inputs of layers is another model than ±a, and has "
    "no operator; try a checkpoint trained with sym_quant_qkvo",
)
_NEEDS: dict[str, dict[str, _Need]] = {
    "bibert": {
        "weight_bits": _ONE_BIT,
        "quantize_act": _Need(
            (True,), "float activations have no operator; try a 1-1-1 checkpoint"
        ),
    },
    "bit": {
        "weight_bits": _ONE_BIT,
        "weight_quant_method": _Need(
            ("bwn",), "no other is of one bit; try the config it was run with"
        ),
        "input_quant_method": _Need(
            ("elastic",),
            "signs scaled by each batch's mean make a text depend on the texts beside it; try a "
            "checkpoint with learned scales",
        ),
        "learnable_scaling": _LEARNED,
        "input_layerwise": _LAYERWISE,
        "sym_quant_qkvo": _SIGNED,
        "sym_quant_ffn_attn": _Need(
            (False,), "the sign of a probability is always 1; try a checkpoint of {0, a}"
        ),
        "not_quantize_attention": _Need(
            (False,), "float attention between bits has no operator; try a 1-1-1 checkpoint"
        ),
    },
    "binarybert": {
        "weight_bits": _ONE_BIT,
        "weight_quant_method": _Need(
            ("bwn", "laq"), "no other is of one bit; try its checkpoint after the split"
        ),
        "input_quant_method": _Need(("uniform", "lsq"), "its code has no other; try one of these"),
        "learnable_scaling": _LEARNED,
        "sym_quant_qkvo": _SIGNED._replace(
            why="codes from the least value of a batch make a text depend on the texts beside it; "
            "try a checkpoint trained with sym_quant_qkvo"
        ),
    },
}  # fmt: skip


def unread_right(scheme: str, settings: Mapping[str, Any]) -> list[str]:
    """Why a model of these ``settings`` cannot be computed."""
    needs = dict(_NEEDS[scheme])
    if settings.get("input_quant_method") == "lsq":
        needs["input_layerwise"] = _LAYERWISE
    reasons = []
    for name, (values, why) in needs.items():
        got = settings.get(name)
        if got is None:
            continue
        kind = type(values[0])
        if (bool(got) if kind is bool else got) not in values:
            need = " or ".join(repr(value) for value in values)
            reasons.append(f"{name}: got {got!r}, need {need}: {why}")
    return reasons


def unlike_the_weights(latent: LatentBert, settings: Mapping[str, Any]) -> list[str]:
    """Sizes that the config states and the weights do not have: such a model reads some of the
    entries only, or none."""
    sizes = {
        "num_hidden_layers": len(latent.layers),
        "hidden_size": latent.words[0].shape[1],
        "intermediate_size": latent.layers[0].up[0].weight.shape[0],
        "vocab_size": latent.words[0].shape[0],
        "max_position_embeddings": latent.position.shape[0],
        "type_vocab_size": latent.token_type.shape[0],
    }
    return [
        f"{name}: got {settings[name]}, need {size} as in the weights; try the config.json beside "
        "them"
        for name, size in sizes.items()
        if settings.get(name) not in (None, size)
    ]


def batch_dependence(options: Mapping[str, Any], dynamic: bool) -> list[str]:
    """Where the result that BinaryBERT's code gives for a text depends on the texts beside it.

    Args:
        options: of the checkpoint: ``symmetric``, ``activation``.
        dynamic: whether its activations are clipped, and scaled by what a batch holds.
    """
    wide = "which no packed row can know"
    if dynamic:
        reasons = [
            "input_quant_method: got 'uniform', whose scale is the largest magnitude of the whole "
            f"batch, {wide}; need 'lsq'"
        ]
    elif not options["symmetric"] and options["activation"] == "gelu":
        reasons = [
            "sym_quant_ffn_attn: got false with hidden_act 'gelu', whose codes count from the "
            f"least value of the whole batch, {wide}; need true, or 'relu', whose least value is 0"
        ]
    else:
        return []
    return [f"{reasons[0]}; try approximate=True, which takes a fixed scale around 0"]
