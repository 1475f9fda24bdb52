"""Training a binarized student to follow a teacher: the losses of BiBERT and BiT, and a plain loop.

Padding has no part in any loss. Rows at padding are set to zero before a similarity matrix or a
norm is taken, and left out of sums and of the counts that means divide by, so a batch gives the
same loss however far it is padded and whatever stands there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantizers import one_of
from .student import BinarizedBert, BinarizedBertOutput

__all__ = [
    "DistillationWeights",
    "direction_matching_loss",
    "distil",
    "distillation_loss",
    "evaluate",
    "hidden_mse_loss",
    "hidden_norm_loss",
    "soft_cross_entropy",
    "teacher_outputs",
]

#: under every norm that is divided by, so that a batch of nothing but padding gives 0 and not NaN
_TINY = 1e-30

#: one batch: ``input_ids``, ``attention_mask`` (or None), and perhaps ``token_type_ids``
Batch = Sequence[Tensor | None]


@dataclass(frozen=True)
class DistillationWeights:
    """How much each loss counts; 0 leaves one out.

    Attributes:
        queries, keys, values: :func:`direction_matching_loss`, summed over layers.
        hidden: the loss of hidden states, summed over the embeddings and layers.
        hidden_form: ``"norm"`` (:func:`hidden_norm_loss`, BiBERT) or ``"mse"``
            (:func:`hidden_mse_loss`, BiT).
        logits: :func:`soft_cross_entropy`; counts only where both models have logits.
    """

    queries: float = 1.0
    keys: float = 1.0
    values: float = 1.0
    hidden: float = 1.0
    hidden_form: str = "norm"
    logits: float = 1.0


def _check_pair(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what}: got {tuple(student.shape)} from the student and {tuple(teacher.shape)} from "
            "the teacher, need the same; try a student of the teacher's width and heads"
        )


def _zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` ``[B, ..., S, N]`` with zeros where the mask ``[B, S]`` is 0, even over NaN."""
    if mask is None:
        return x
    padding = (mask == 0).view(mask.shape[0], *[1] * (x.ndim - 3), mask.shape[1], 1)
    return x.masked_fill(padding, 0)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp(min=_TINY)


def direction_matching_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``|| P_s / ||P_s|| - P_t / ||P_t|| ||`` with ``P = X X^T / sqrt(d)``: BiBERT's Direction-
    Matching Distillation (arXiv 2203.06390) of one of Q, K and V in one layer.

    Norms are over the whole batch, as in the published training.

    Args:
        student: ``[B, H, S, d]``, before it is binarized.
        teacher: the same shape up to ``d``.
        mask: ``[B, S]``, 0 at padding; no padding if not given.

    Returns:
        ``[]``, from 0 to 2.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_pair("direction matching", student[..., 0], teacher[..., 0])
    student, teacher = _zero_padding(student, mask), _zero_padding(teacher, mask)
    ours = student @ student.transpose(-1, -2) / student.shape[-1] ** 0.5
    theirs = teacher @ teacher.transpose(-1, -2) / teacher.shape[-1] ** 0.5
    return torch.linalg.vector_norm(_unit(ours) - _unit(theirs))


def hidden_norm_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``|| X_s / ||X_s|| - X_t / ||X_t|| ||``, norms over the whole batch: BiBERT's, for hidden
    states.

    Args:
        student, teacher: ``[B, S, N]`` each.
        mask: ``[B, S]``, 0 at padding; no padding if not given.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_pair("hidden states", student, teacher)
    student, teacher = _zero_padding(student, mask), _zero_padding(teacher, mask)
    return torch.linalg.vector_norm(_unit(student) - _unit(teacher))


def hidden_mse_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference over real tokens, 0 if there is none: BiT's for hidden states.

    Args and errors as of :func:`hidden_norm_loss`.
    """
    _check_pair("hidden states", student, teacher)
    difference = _zero_padding(student - teacher, mask)
    tokens = student[..., 0].numel() if mask is None else (mask != 0).sum().clamp(min=1)
    return difference.square().sum() / (tokens * student.shape[-1])


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's logits ``[B, C]`` under the teacher's probabilities, summed
    over classes and averaged over the batch; both are divided by ``temperature`` first.

    Raises:
        ValueError: shapes that differ.
    """
    _check_pair("logits", student, teacher)
    target = (teacher / temperature).softmax(-1)
    return -(target * (student / temperature).log_softmax(-1)).sum(-1).mean()


def teacher_outputs(teacher: nn.Module, batch: Batch) -> BinarizedBertOutput:
    """A teacher's outputs on a batch, without a gradient, in the form a student returns them.

    Args:
        teacher: a Hugging Face BertModel or BertForSequenceClassification, whose Q, K and V are
            read off their projections; or a :class:`BinarizedBert`, for distilling in steps of
            fewer and fewer bits, as in BiT. It runs in the mode it is in.
        batch: ``input_ids``, ``attention_mask`` or None, and perhaps ``token_type_ids``.

    Raises:
        ValueError: a model without ``attention.self.query``, ``key`` and ``value``.
    """
    with torch.no_grad():
        if isinstance(teacher, BinarizedBert):
            return teacher(*batch)
        found: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
        hooks = []
        for name, module in teacher.named_modules():
            path, _, last = name.rpartition(".")
            if last in found and path.endswith("attention.self"):
                hooks.append(module.register_forward_hook(_keep_heads(teacher, found[last])))
        if not hooks:
            raise ValueError(
                f"teacher: got {type(teacher).__name__} without attention.self.query, key and "
                "value, need BERT's modules; try transformers.BertModel"
            )
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = dict(zip(names, batch, strict=False))
        try:
            out = teacher(**inputs, output_hidden_states=True, return_dict=True)
        finally:
            for hook in hooks:
                hook.remove()
    return BinarizedBertOutput(
        out.hidden_states[-1], getattr(out, "pooler_output", None), getattr(out, "logits", None),
        tuple(out.hidden_states), tuple(found["query"]), tuple(found["key"]), tuple(found["value"]),
    )  # fmt: skip


def _keep_heads(teacher: Any, to: list[Tensor]) -> Callable[[Any, Any, Tensor], None]:
    """A hook that appends what a projection returns, ``[B, S, H * d]``, as ``[B, H, S, d]``."""
    heads = int(teacher.config.num_attention_heads)

    def hook(_: Any, __: Any, out: Tensor) -> None:
        to.append(out.unflatten(-1, (heads, -1)).transpose(1, 2))

    return hook


def distillation_loss(
    student: BinarizedBertOutput,
    teacher: BinarizedBertOutput,
    mask: Tensor | None = None,
    weights: DistillationWeights | None = None,
) -> Tensor:
    """The weighted sum of all losses.

    A teacher of r times as many layers is followed at every r-th: the last of each group of r.

    Args:
        student, teacher: outputs on one batch.
        mask: ``[B, S]``, 0 at padding; no padding if not given.
        weights: all 1 if not given.

    Raises:
        ValueError: layers that do not divide, shapes that do not fit, or an unknown hidden_form.
    """
    weights = weights or DistillationWeights()
    one_of("hidden_form", weights.hidden_form, ("norm", "mse"))
    ours, theirs = len(student.queries), len(teacher.queries)
    ratio = theirs // max(ours, 1)
    if ours == 0 or theirs != ours * ratio:
        raise ValueError(
            f"layers: got {ours} in the student and {theirs} in the teacher, need a divisor; try "
            "from_dense(..., layers=...)"
        )
    total = student.last_hidden_state.new_zeros(())
    for name in ("queries", "keys", "values"):
        weight = getattr(weights, name)
        if weight:
            for one, other in zip(
                getattr(student, name), getattr(teacher, name)[ratio - 1 :: ratio], strict=True
            ):
                total = total + weight * direction_matching_loss(one, other, mask)
    if weights.hidden:
        loss = hidden_norm_loss if weights.hidden_form == "norm" else hidden_mse_loss
        for one, other in zip(student.hidden_states, teacher.hidden_states[::ratio], strict=True):
            total = total + weights.hidden * loss(one, other, mask)
    if weights.logits and student.logits is not None and teacher.logits is not None:
        total = total + weights.logits * soft_cross_entropy(student.logits, teacher.logits)
    return total


def evaluate(
    student: BinarizedBert,
    teacher: nn.Module,
    batches: Sequence[Batch],
    weights: DistillationWeights | None = None,
) -> float:
    """The mean of :func:`distillation_loss` over batches, without dropout or a gradient."""
    was = student.training
    student.eval()
    try:
        with torch.no_grad():
            losses = [
                float(distillation_loss(student(*b), teacher_outputs(teacher, b), b[1], weights))
                for b in batches
            ]
    finally:
        student.train(was)
    return sum(losses) / len(losses)


def distil(
    student: BinarizedBert,
    teacher: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int | None = None,
    learning_rate: float = 5e-4,
    scale_learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    weights: DistillationWeights | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> list[float]:
    """Trains ``student``, in place, with AdamW and a learning rate that falls linearly to 0.

    The batches are taken in an order drawn anew for each round from ``seed``, which also decides
    dropout; the state of torch's own generators is left as it was. On one machine and number of
    threads the result depends on the arguments alone. Scales that have no value are calibrated on
    ``batches[0]`` first. Biases, LayerNorms and learned scales and shifts are not decayed.

    Args:
        student: trained in training mode, and left in evaluation mode.
        teacher: see :func:`teacher_outputs`; put into evaluation mode.
        batches: ``(input_ids, attention_mask[, token_type_ids])`` each, on the student's device.
        steps: how many, one batch each; one round over the batches if not given.
        learning_rate: of the first step.
        scale_learning_rate: the same for learned scales.
        weight_decay: of AdamW.
        weights: of the losses, all 1 if not given.
        seed: of the order and of dropout.
        on_step: called with the step's number, from 0, and its loss.

    Returns:
        The loss of every step, before it was taken.

    Raises:
        ValueError: no batches or steps, or as :func:`distillation_loss`.
        FloatingPointError: a loss that is not finite.
    """
    total = len(batches) if steps is None else steps
    if not batches or total < 1:
        raise ValueError(
            f"batches: got {len(batches)} for {total} steps, need at least one of each; try steps=1"
        )
    teacher.eval()
    if not student.calibrated:
        student.calibrate(*batches[0])  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        _groups(student, learning_rate, scale_learning_rate, weight_decay)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    order_of = torch.Generator().manual_seed(seed)
    history: list[float] = []
    student.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order: list[int] = []
        for step in range(total):
            if not order:
                order = torch.randperm(len(batches), generator=order_of).tolist()
            batch = batches[order.pop()]
            wanted = teacher_outputs(teacher, batch)
            loss = distillation_loss(student(*batch), wanted, batch[1], weights)
            history.append(float(loss.detach()))
            if not math.isfinite(history[-1]):
                raise FloatingPointError(
                    f"distil: got a loss of {history[-1]} at step {step}, need a finite one; try a "
                    f"learning_rate below {learning_rate}"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step(step, history[-1])
    student.eval()
    return history


def _groups(
    student: nn.Module, rate: float, scale_rate: float, decay: float
) -> list[dict[str, Any]]:
    """For AdamW: matrices, vectors without decay, and scales at a rate of their own."""
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": rate, "weight_decay": decay},
        {"params": [], "lr": rate, "weight_decay": 0.0},
        {"params": [], "lr": scale_rate, "weight_decay": 0.0},
    ]
    for parameter in student.parameters():
        groups[{2: 0, 1: 1, 0: 2}[parameter.ndim]]["params"].append(parameter)
    return [group for group in groups if group["params"]]
