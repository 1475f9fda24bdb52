"""``binarize``: latent float weights to a packed model, with proof.

Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...conversion.in_place import ConvertError
from ...nn import (
    BinaryAttention,
    BinaryBert,
    BinaryEmbedding,
    BinaryFeedForward,
    EncoderLayer,
    LinearBinary,
    LinearBinarySum,
    MixedAttention,
    PackedEncoder,
    RowNorm,
)
from ...nn.binary.bert import BinaryEmbeddings
from ...nn.binary.row_packer import SCALE_FLOOR, one_of
from .checkpoint_checks import unwrapped
from .checkpoints import read_checkpoint
from .equality import compare, compare_with_student
from .latent import LatentBert, LatentLayer, Linears
from .report import BinaryReport, size_of
from .student import BinarizedBert

__all__ = ["binarize"]


def binarize(
    model: nn.Module | Mapping[str, Any],
    *,
    scheme: str | None = None,
    config: Any = None,
    exact: bool | None = None,
    ties: str | None = None,
    score_ties: str | None = None,
    activation_bits: int | None = None,
    trained: bool = False,
    approximate: bool = False,
    check: bool = True,
) -> BinaryBert:
    """A packed model from one that was trained to be binary; the original is not changed.

    Reads filbert's own :class:`~filbert.compress.binarize.BinarizedBert`, and models or state dicts
    of the published BiBERT, BiT and BinaryBERT codes, split or not, with their float (latent)
    weights. Every part of the result is run against the eager model on a small padded batch;
    ``print(result.report)`` shows what was compared, and what the file weighs.

    Signs of 0 are 0 in the papers' code, which one bit cannot hold, and they are no edge case: a
    sum of an even number of ±1 is often 0. The result keeps them, in a second plane of bits. The
    two-valued forms make such a sign -1 or +1, which is faster and another model than the published
    one; they are for what was trained so, and for whoever asks with ``ties``.

    Args:
        model: a model, or a state dict.
        scheme: ``"bibert"``, ``"bit"`` or ``"binarybert"``, where the entries do not tell.
        config: of the model, a dict or an object with ``to_dict``; the model's own if not given.
            ``num_attention_heads`` is needed; one of filbert's own tells the scheme too. See
            :func:`~filbert.compress.binarize.checkpoints.read_checkpoint`.
        exact: if not given, signs of 0 are as the model was trained: 0 in published models. True
            also refuses weights that are themselves such ties, which one bit cannot hold and which
            else become -1 and are counted. False asks for a two-valued form: ``ties="below"`` of
            models of ``torch.sign``, and of a model trained with other ties those.
        ties: asks for a two-valued form: a sign makes of 0 -1 (``"below"``) or +1 (``"above"``).
        score_ties: of BiBERT's attention: whether a score of 0 is chosen (``"above"``, the paper's
            equation) or not (``"below"``, its code). As trained if not given.
        activation_bits: 2, 4 or 8, of BinaryBERT; those it was trained with, where they are known.
        trained: that weights without any entry that says so were trained to be binary. Without it
            an ordinary BERT is refused: its signs alone compute noise.
        approximate: take a fixed scale where the published BinaryBERT takes the extremes of the
            whole batch, padding too, which makes a text's result depend on the texts beside it.
            Without it such a model is refused; with it the report's notes name each place.
        check: compare with the eager model, and a BinarizedBert with its own forward pass; the cost
            is that of a few forward passes.

    Returns:
        The packed model, with a ``report``.

    Raises:
        ConvertError: (a ValueError) with all reasons: an ordinary model, a checkpoint of signs that
            lost their scales, a Paddle or BiPFT checkpoint, another architecture than BERT's
            encoder, missing, unknown or unfit entries, settings that no operator computes, scales
            that were never calibrated (NaN in filbert's students, exactly 1 in published
            checkpoints), or ``exact`` with weights that are themselves ties.
        ValueError: an unknown ``ties`` or ``score_ties``.
    """
    one_of("ties", ties, (None, "below", "above"))
    one_of("score_ties", score_ties, (None, "below", "above"))
    latent = read_checkpoint(
        model, scheme=scheme, config=config, activation_bits=activation_bits, trained=trained,
        approximate=approximate,
    )  # fmt: skip
    latent.score_ties = score_ties or latent.score_ties
    if exact and (ties is not None or latent.ties != "zero"):
        raise ConvertError(
            "exact", [f"got ties {ties or latent.ties!r}, need a model of torch.sign"],
            "leave out exact: a model trained with these ties is equal bit for bit as it is",
        )  # fmt: skip
    if latent.ties != "zero":
        policy = ties or latent.ties
    elif ties is None and exact is not False:
        policy = "exact"
    else:
        policy = ties or "below"
    with torch.no_grad():
        packed = _build(latent, policy)
    weight_ties, zero_rows = _count(packed)
    if exact and weight_ties:
        raise ConvertError(
            "exact", [f"{weight_ties} weights equal their mean: their sign is 0, and weights have "
                      "one bit"], "leave out exact, which makes them -1 and counts them",
        )  # fmt: skip
    packed.report = BinaryReport(
        latent.scheme, policy, size_of(packed, latent.fp32_bytes), (), weight_ties, zero_rows,
        latent.notes,
    )  # fmt: skip
    gelu = latent.scheme == "bibert" and latent.activation == "gelu"
    if gelu and policy == "above" and latent.ties == "zero":
        latent.notes.append(
            "below about -5.54 float32 GELU is -0.0, a tie that stays -1 here, as its argument is, "
            "where ties 'above' make all others +1"
        )
    if check:
        with torch.inference_mode():
            parts = list(compare(latent, packed, *_example(latent)))
        student = unwrapped(model)
        if isinstance(student, BinarizedBert):
            if all(t.dtype == torch.float32 and t.is_cpu for t in student.parameters()):
                parts.append(compare_with_student(student, packed, *_example(latent)))
            else:
                latent.notes.append(
                    "not compared with the trained model's own forward pass, which needs it in "
                    "float32 on the CPU"
                )
        packed.report.parts = parts
    return packed


def _build(latent: LatentBert, ties: str) -> BinaryBert:
    words = [
        BinaryEmbedding.from_weight(
            table, centre=latent.word_centre, granularity=latent.word_granularity,
            weight_ties=latent.ties,
        )
        for table in latent.words
    ]  # fmt: skip
    embeddings = BinaryEmbeddings(
        words, latent.position.clone(), latent.token_type.clone(), _norm(latent, latent.norm)
    )
    encoder = PackedEncoder([_layer(latent, layer, ties) for layer in latent.layers])
    classifier = None
    if latent.classifier is not None:
        weight, bias = latent.classifier
        classifier = nn.Linear(weight.shape[1], weight.shape[0])
        classifier.weight.data, classifier.bias.data = weight.clone(), bias.clone()
    about = {
        "scheme": latent.scheme, "ties": ties, "score_ties": latent.score_ties,
        "activation_bits": latent.bits,
    }  # fmt: skip
    pooler = None if latent.pooler is None else _linear(latent, latent.pooler, ties)
    return BinaryBert(embeddings, encoder, pooler, classifier, head=latent.head, about=about)


def _norm(latent: LatentBert, norm: tuple[Tensor, Tensor]) -> nn.LayerNorm:
    module = nn.LayerNorm(norm[0].shape[0], eps=latent.eps).requires_grad_(False)
    module.weight.data, module.bias.data = norm[0].clone(), norm[1].clone()
    return module


def _linear(latent: LatentBert, linears: Linears, ties: str) -> LinearBinary | LinearBinarySum:
    made = [
        LinearBinary.from_weight(
            one.weight, one.bias, one.packer(ties), centre=one.centre,
            granularity=one.granularity, input_scale=one.input_scale, weight_ties=latent.ties,
        )
        for one in linears
    ]  # fmt: skip
    return made[0] if len(made) == 1 else LinearBinarySum(made)


def _layer(latent: LatentBert, layer: LatentLayer, ties: str) -> EncoderLayer:
    sides = [_linear(latent, side, ties) for side in (layer.query, layer.key, layer.value)]
    out, up, down = (_linear(latent, side, ties) for side in (layer.out, layer.up, layer.down))
    attention: BinaryAttention | MixedAttention
    if latent.scheme == "binarybert":
        attention = MixedAttention(
            sides, latent.heads, bits=latent.bits,
            scales=None if None in layer.scales else torch.tensor(layer.scales),
            clips=layer.clips, prob_levels=latent.prob_levels,
        )  # fmt: skip
    else:
        binary = [side for side in sides if isinstance(side, LinearBinary)]
        assert isinstance(out, LinearBinary)
        a_q, a_k, a_v, a_p = (max(1.0 if a is None else a, SCALE_FLOOR) for a in layer.scales)
        dim = layer.query[0].weight.shape[0] // latent.heads
        softmax = latent.scheme == "bit"
        attention = BinaryAttention(
            binary, latent.heads, out.packer, score_ties=latent.score_ties,
            score_scale=a_q * a_k / dim**0.5 if softmax else None,
            prob_scale=a_p, value_scale=a_v,
        )  # fmt: skip
    norms = [RowNorm(*norm, latent.eps) for norm in (layer.attn_norm, layer.ffn_norm)]
    feed_forward = BinaryFeedForward(up, down, latent.activation)
    return EncoderLayer(attention, out, norms[0], feed_forward, norms[1])


def _count(model: BinaryBert) -> tuple[int, int]:
    """Weights whose sign the eager model does not have, and rows whose scale is 0."""
    parts = [m for m in model.modules() if isinstance(m, LinearBinary | BinaryEmbedding)]
    return sum(p.weight_ties for p in parts), sum(int((p.alpha == 0).sum()) for p in parts)


def _example(latent: LatentBert) -> tuple[Tensor, Tensor, Tensor]:
    """A padded batch of random tokens: ids, mask and types ``[B, S]``."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    size = min(24, latent.position.shape[0])
    lengths = torch.tensor([size, max(1, size // 2), 1, max(1, size - 3)])
    shape = (len(lengths), size)
    ids = torch.randint(latent.words[0].shape[0], shape, generator=generator)
    types = torch.randint(latent.token_type.shape[0], shape, generator=generator)
    return ids, torch.arange(size) < lengths[:, None], types
