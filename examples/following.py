"""A student that follows its teacher: what the fine-tuning examples share."""

from __future__ import annotations

import random

import torch
from passages import Batch, mean_pooled
from torch.nn import functional as F


def one_by_one(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """The model's arguments for one text at a time, without its padding."""
    return [
        {"input_ids": ids[None, : int(n)], "attention_mask": mask[None, : int(n)]}
        for ids, mask, n in zip(*batch, batch[1].sum(1), strict=True)
    ]


@torch.no_grad()
def mean_cosine(student: torch.nn.Module, teacher: torch.nn.Module, batches: list[Batch]) -> float:
    """Of the student's embedding of each text with the teacher's."""
    student.eval()
    found = [
        F.cosine_similarity(*(mean_pooled(hidden_of(m, one), one[1]) for m in (student, teacher)))
        for one in batches
    ]
    return float(torch.cat(found).mean())


def hidden_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The last hidden states ``[B, S, N]``."""
    ids, mask = batch
    hidden: torch.Tensor = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden


def fine_tune(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: list[Batch],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> list[float]:
    """Makes the student's hidden states and embeddings those of the teacher.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.1
    )
    order = random.Random(seed)
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()  # the teacher has none
    history = []
    for step in range(steps):
        batch = order.choice(batches)
        mask = batch[1].bool()
        with torch.no_grad():
            right = hidden_of(teacher, batch)
        ours = hidden_of(student, batch)
        cosine = F.cosine_similarity(mean_pooled(ours, batch[1]), mean_pooled(right, batch[1]))
        loss = F.mse_loss(ours[mask], right[mask]) / right[mask].var() + (1 - cosine.mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(float(loss.detach()))
        if step % 20 == 0 or step == steps - 1:
            print(f"  step {step:4}  loss {history[-1]:.4f}", flush=True)
    return history
