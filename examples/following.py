"""A student that follows its teacher: what the fine-tuning examples share."""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from passages import Batch, make_batches, mean_pooled, split_passages
from torch.nn import functional as F

from filbert.app.corpus import minilm_folder
from filbert.app.embedder import Embedder, ModelFolder


class Training(Protocol):
    """What the library makes of a student for a while."""

    def finish(self) -> Any:
        """Packs it."""


def add_arguments(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    """What both examples are asked for."""
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, metavar="R")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="a few short texts, a few steps")


@dataclass
class Lesson:
    """What a student learns from: its teacher, batches to follow, and others to be measured on."""

    teacher: torch.nn.Module
    seen: list[Batch]
    held_out: list[Batch]
    steps: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Lesson:
        """That of :func:`add_arguments`; also sets threads and seed."""
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        torch.manual_seed(args.seed)
        steps, limit, max_length = args.steps, None, 96
        if args.smoke:
            steps, limit, max_length = min(args.steps, 8), 48, 24
        embedder = Embedder.load(ModelFolder.read(minilm_folder()), convert=False)
        seen, held_out = (
            make_batches(embedder, part, 16, max_length) for part in split_passages(limit)
        )
        return cls(embedder.model.eval(), seen, held_out, steps)

    def teach(
        self, student: torch.nn.Module, training: Training, args: argparse.Namespace
    ) -> tuple[float, float]:
        """Fine-tunes the student and packs it.

        Returns:
            Its mean cosine with the teacher on held-out texts, before it is packed and after.
        """
        started = time.perf_counter()
        fine_tune(
            student, self.teacher, self.seen, steps=self.steps, learning_rate=args.learning_rate,
            seed=args.seed,
        )  # fmt: skip
        print(f"{self.steps} steps in {time.perf_counter() - started:.0f} s")
        simulated = mean_cosine(student, self.teacher, self.held_out)
        training.finish()
        return simulated, mean_cosine(student, self.teacher, self.held_out)

    def calibration(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Texts of so many of the seen batches, one by one."""
        few = self.seen[:: max(1, len(self.seen) // count)]
        return [one for batch in few for one in one_by_one(batch)]


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
