"""``python -m filbert.app.demo``: a real model on real text, with transformers and with filbert.

Embeds Python's own help topics with all-MiniLM-L6-v2 three times in one process: by transformers
as most code does it (padded batches of 32 in input order), by transformers at its best (the same,
sorted by length first), and by the converted model. Then answers questions with the embeddings.
The texts are tokenized once, outside the clock. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import Passage, help_passages, minilm_folder
from .embedding import BATCH_TOKENS, Embedder, EmbedError, ModelFolder, plan_batches, progress

__all__ = ["QUESTIONS", "main"]

QUESTIONS = (
    "how do I catch an exception?",
    "what does the yield keyword do?",
    "how can I remove an item from a list?",
    "how do I format a number with two decimals?",
    "why would I use a with statement?",
)

#: largest difference in any value of two unit vectors that rounding explains: float32 sums in
#: another order, and bfloat16 with its 8 bits through six layers
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

_BATCH = 32


@dataclass(frozen=True)
class Run:
    """One timed pass over all passages; ``embeddings`` ``[passages, N]`` float32, unit length."""

    name: str
    seconds: float
    tokens: int
    padding_share: float
    embeddings: np.ndarray

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted."""
        return self.tokens / self.seconds


def _measure(
    embedder: Embedder, name: str, ids: list[list[int]], batches: list[list[int]], bar: Any
) -> Run:
    bar.set_description(name)
    for batch in batches[:2]:  # threads, caches and oneDNN's generated code, outside the clock
        embedder.embed_batch([ids[i] for i in batch])
    started = time.perf_counter()
    rows = embedder.embed_ids(ids, batches, lambda texts, tokens: bar.update(texts))
    seconds = time.perf_counter() - started
    tokens = sum(map(len, ids))
    padded = sum(len(batch) * max(len(ids[i]) for i in batch) for batch in batches)
    share = 0.0 if embedder.converted else 1 - tokens / padded
    return Run(name, seconds, tokens, share, rows)


def _differences(run: Run, baseline: Run) -> tuple[float, float]:
    """Largest difference of any value, and the lowest cosine of any passage with itself."""
    largest = float(np.abs(run.embeddings - baseline.embeddings).max())
    cosine = float((run.embeddings * baseline.embeddings).sum(axis=1, dtype=np.float64).min())
    return largest, cosine


def _table(runs: list[Run]) -> str:
    head = ["", "seconds", "tokens/s", "speed-up", "padding", "max |diff|", "min cosine"]
    lines = [head]
    for run in runs:
        largest, cosine = _differences(run, runs[0])
        against = ["-", "-"] if run is runs[0] else [f"{largest:.1e}", f"{cosine:.6f}"]
        lines.append([
            run.name,
            f"{run.seconds:.2f}",
            f"{run.tokens_per_second:,.0f}",
            f"{runs[0].seconds / run.seconds:.2f}x",
            f"{run.padding_share:.1%}",
            *against,
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]),
                   *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )  # fmt: skip


def _search(embedder: Embedder, passages: list[Passage], rows: np.ndarray) -> list[dict[str, Any]]:
    """The three nearest passages to every question, by cosine."""
    ids = embedder.tokenize(QUESTIONS)
    batches = plan_batches([len(one) for one in ids], batch_tokens=BATCH_TOKENS)
    scores = embedder.embed_ids(ids, batches) @ rows.T
    answers = []
    for question, row in zip(QUESTIONS, scores, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        found = [{"title": passages[i].title, "score": round(float(row[i]), 4)} for i in best]
        answers.append({"question": question, "passages": found})
    return answers


def _environment() -> dict[str, Any]:
    import torch
    import transformers

    from .. import __version__, _load

    return {
        "filbert": __version__,
        "kernels": "compiled" if _load.have_ops() else f"reference: {_load.missing['ops']}",
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m filbert.app.demo",
        description="Embeds Python's help topics with transformers and with filbert, and compares.",
        allow_abbrev=False,
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only N passages, evenly spread")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def run_demo(args: argparse.Namespace) -> int:
    """Runs the three passes and the questions; returns 1 where the embeddings disagree."""
    import torch

    from ..conversion.in_place import convert

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    passages = help_passages()
    if args.limit is not None and args.limit < len(passages):
        passages = [passages[i * len(passages) // args.limit] for i in range(args.limit)]
    embedder = Embedder.load(ModelFolder.read(minilm_folder()), dtype=args.dtype, convert=False)
    ids = embedder.tokenize([passage.text for passage in passages])
    lengths = [len(one) for one in ids]
    environment = _environment()
    attention = str(embedder.model.config._attn_implementation)
    print(f"model    all-MiniLM-L6-v2, {args.dtype}, {embedder.dimension} values per embedding")
    print(
        f"text     {len(passages)} passages of Python's help topics, {sum(lengths):,} tokens "
        f"({min(lengths)} to {max(lengths)}, mean {sum(lengths) / len(lengths):.0f})"
    )
    print("machine  " + ", ".join(f"{name} {value}" for name, value in environment.items()))

    arrival = [
        list(range(first, min(first + _BATCH, len(ids)))) for first in range(0, len(ids), _BATCH)
    ]
    by_length = plan_batches(lengths, batch_size=_BATCH)
    runs = []
    with progress(3 * len(ids), "", quiet=args.quiet) as bar:
        label = f"transformers, {attention}"
        runs.append(_measure(embedder, f"{label}, input order", ids, arrival, bar))
        runs.append(_measure(embedder, f"{label}, length-sorted", ids, by_length, bar))
        convert(embedder.model)
        embedder.converted = True
        packed = plan_batches(lengths, batch_tokens=BATCH_TOKENS)
        runs.append(_measure(embedder, "filbert, packed", ids, packed, bar))

    print(f"\n{_table(runs)}\n")
    print(
        f"transformers runs batches of {_BATCH}, padded to their longest; filbert runs up to "
        f"{BATCH_TOKENS:,} tokens at once, none of them padding. Differences are against the first "
        "line.\n"
    )
    answers = _search(embedder, passages, runs[-1].embeddings)
    for answer in answers:
        print(answer["question"])
        for found in answer["passages"]:
            print(f"  {found['score']:.3f}  {found['title']}")
    if args.json is not None:
        numbers = _numbers(args.dtype, environment, lengths, runs, answers)
        args.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    largest, _ = _differences(runs[-1], runs[0])
    if not largest <= TOLERANCE[args.dtype]:
        print(
            f"\nfilbert.app.demo: the embeddings differ: got {largest:.2e} between filbert and "
            f"transformers, need at most {TOLERANCE[args.dtype]:.0e} in {args.dtype}; "
            "try: make test, to see which kernel is wrong",
            file=sys.stderr,
        )
        return 1
    return 0


def _numbers(
    dtype: str,
    environment: dict[str, Any],
    lengths: list[int],
    runs: list[Run],
    answers: list[dict[str, Any]],
) -> dict[str, Any]:
    """What ``--json`` writes; times in seconds, ``speed_up`` over the first run."""
    rows = []
    for run in runs:
        largest, cosine = _differences(run, runs[0])
        rows.append({
            "name": run.name,
            "seconds": run.seconds,
            "tokens_per_second": run.tokens_per_second,
            "speed_up": runs[0].seconds / run.seconds,
            "padding_share": run.padding_share,
            "max_abs_diff": largest,
            "min_cosine": cosine,
        })  # fmt: skip
    return {
        "model": "all-MiniLM-L6-v2",
        "dtype": dtype,
        "environment": environment,
        "passages": len(lengths),
        "tokens": sum(lengths),
        "tolerance": TOLERANCE[dtype],
        "runs": rows,
        "answers": answers,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Exit status: 0 good, 1 failed or the embeddings differ, 2 wrong usage."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        for name in ("limit", "threads"):
            value = getattr(args, name)
            if value is not None and value < 1:
                parser.error(f"argument --{name}: got {value}, need a whole number above 0")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return run_demo(args)
    except KeyboardInterrupt:
        print("filbert.app.demo: stopped", file=sys.stderr)
        return 130
    except (EmbedError, OSError) as error:
        print(f"filbert.app.demo: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
