"""Distils a one-bit student from all-MiniLM-L6-v2 on Python's help topics, and converts it.

    python examples/distil_binary.py --steps 160 --out binary-minilm

The student starts from half of the teacher's layers and follows its Q, K, V and hidden states
(BiBERT, arXiv 2203.06390, or BiT, arXiv 2205.13016). Minutes of training on a few hundred passages
show the method; they do not make a model one would search with. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from passages import Batch, make_batches, mean_pooled, split_passages
from torch.nn import functional as F

import filbert
from filbert.app.corpus import minilm_folder
from filbert.app.embedder import Embedder, ModelFolder
from filbert.compress.binarize import BinarizedBert, distil, evaluate, teacher_outputs


@dataclass
class Trained:
    """What :func:`train` made.

    Attributes:
        student: in evaluation mode.
        held_out: batches of help topics that training never saw.
        history: the loss of every step.
        loss: on the held-out batches, before and after.
        cosine: mean of student's and teacher's held-out embeddings, before and after.
        seconds: of training alone.
    """

    student: BinarizedBert
    held_out: list[Batch]
    history: list[float]
    loss: tuple[float, float]
    cosine: tuple[float, float]
    seconds: float


@torch.no_grad()
def mean_cosine(student: BinarizedBert, teacher: torch.nn.Module, batches: list[Batch]) -> float:
    """Of the student's embedding of each text with the teacher's."""
    student.eval()
    found = []
    for ids, mask in batches:
        ours = mean_pooled(student(ids, mask).last_hidden_state, mask)
        theirs = mean_pooled(teacher_outputs(teacher, (ids, mask)).last_hidden_state, mask)
        found.append(F.cosine_similarity(ours, theirs))
    return float(torch.cat(found).mean())


def train(
    *,
    scheme: str = "bibert",
    steps: int = 160,
    batch_size: int = 16,
    max_length: int = 64,
    limit: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Trained:
    """Distils a student of three layers.

    Args:
        scheme: ``"bibert"`` or ``"bit"``.
        steps: of training, one batch each.
        batch_size: texts in a batch.
        max_length: tokens kept of a text.
        limit: only so many passages, evenly spread; all if not given.
        seed: decides everything that is drawn.
        quiet: print nothing.
    """
    embedder = Embedder.load(ModelFolder.read(minilm_folder()), convert=False)
    teacher = embedder.model
    seen, held_out = (
        make_batches(embedder, texts, batch_size, max_length) for texts in split_passages(limit)
    )

    # ties="below": a sign that fits in a bit, so that the packed model computes the same.
    student = BinarizedBert.from_dense(
        teacher, scheme, layers=(1, 3, 5), dropout=0.0, ties="below", pooler=False
    )
    student.calibrate(*seen[-1])
    before = evaluate(student, teacher, held_out), mean_cosine(student, teacher, held_out)

    def report(step: int, loss: float) -> None:
        if not quiet and (step % 20 == 0 or step == steps - 1):
            print(f"  step {step:4}  loss {loss:.3f}", flush=True)

    started = time.perf_counter()
    history = distil(
        student, teacher, seen, steps=steps, learning_rate=1e-3, seed=seed, on_step=report
    )
    seconds = time.perf_counter() - started
    after = evaluate(student, teacher, held_out), mean_cosine(student, teacher, held_out)
    return Trained(
        student, held_out, history, (before[0], after[0]), (before[1], after[1]), seconds
    )


@torch.no_grad()
def convert_and_compare(trained: Trained, folder: Path) -> float:
    """Packs the student, saves and loads it, prints its report; returns the largest difference of
    any value at a real token from the eager student's."""
    binary = filbert.binarize(trained.student)
    print(binary.report)
    path = folder / "binary.safetensors"
    binary.save(path)
    loaded = filbert.load_binary(path)
    largest = 0.0
    for ids, mask in trained.held_out:
        eager = trained.student(ids, mask).last_hidden_state
        packed = loaded(ids, mask).last_hidden_state
        largest = max(largest, float((eager - packed)[mask != 0].abs().max()))
    return largest


def main(argv: list[str] | None = None) -> int:
    """Runs the example; 1 where the loss on held-out topics did not fall."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scheme", choices=["bibert", "bit"], default="bibert")
    parser.add_argument("--steps", type=int, default=160, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("binary-minilm"), metavar="FOLDER")
    parser.add_argument("--smoke", action="store_true", help="a few short texts, a few steps")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    sizes = {"steps": args.steps}
    if args.smoke:
        sizes = {"steps": min(args.steps, 12), "batch_size": 8, "max_length": 24, "limit": 64}
    trained = train(scheme=args.scheme, seed=args.seed, **sizes)
    tenth = max(1, len(trained.history) // 10)  # batches of short texts have lower losses
    first, last = sum(trained.history[:tenth]) / tenth, sum(trained.history[-tenth:]) / tenth
    print(
        f"{len(trained.history)} steps in {trained.seconds:.0f} s, the loss from {first:.3f} to "
        f"{last:.3f} (means of the first and last tenth)"
    )
    print(
        f"held-out topics: loss {trained.loss[0]:.3f} -> {trained.loss[1]:.3f}, cosine with the "
        f"teacher's embeddings {trained.cosine[0]:.3f} -> {trained.cosine[1]:.3f}"
    )
    trained.student.save(args.out)
    print(f"saved {args.out}")
    largest = convert_and_compare(trained, args.out)
    print(f"largest difference from the eager student on held-out text: {largest:.1e}")
    return 0 if trained.loss[1] < trained.loss[0] else 1


if __name__ == "__main__":
    sys.exit(main())
