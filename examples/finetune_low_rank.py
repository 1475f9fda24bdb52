"""Fine-tunes all-MiniLM-L6-v2 with weights of low rank on Python's help topics, and packs it.

    python examples/finetune_low_rank.py --param-ratio 0.5 --steps 200

The student's factors are made of the teacher's weights and what they do on the help topics, and
then follow the teacher's hidden states (FlashSVD, arXiv 2508.01506). The same budget without
training, from the weights alone and from their results, is shown beside it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from following import fine_tune, mean_cosine, one_by_one
from passages import make_batches, split_passages

import filbert
from filbert.app.corpus import minilm_folder
from filbert.app.embedder import Embedder, ModelFolder
from filbert.compress.lowrank import FactorTraining


def main(argv: list[str] | None = None) -> int:
    """Runs the example; 1 where training did not help."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--param-ratio", type=float, default=0.5, metavar="SHARE")
    parser.add_argument("--steps", type=int, default=200, metavar="N")
    parser.add_argument("--learning-rate", type=float, default=3e-4, metavar="R")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--smoke", action="store_true", help="a few short texts, a few steps")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    steps, limit, max_length = args.steps, None, 96
    if args.smoke:
        steps, limit, max_length = min(args.steps, 8), 48, 24
    embedder = Embedder.load(ModelFolder.read(minilm_folder()), convert=False)
    teacher = embedder.model.eval()
    texts, unseen = split_passages(limit)
    seen, held_out = (make_batches(embedder, part, 16, max_length) for part in (texts, unseen))
    few = seen[:: max(1, len(seen) // 12)]
    calibration = [one for batch in few for one in one_by_one(batch)]
    ratio = args.param_ratio
    plain, whitened = (
        mean_cosine(
            filbert.factorize(copy.deepcopy(teacher), param_ratio=ratio, calibration=given),
            teacher, held_out,
        )
        for given in (None, calibration)
    )  # fmt: skip
    student = copy.deepcopy(teacher)
    training = FactorTraining(student, param_ratio=ratio, calibration=calibration)
    started = time.perf_counter()
    fine_tune(student, teacher, seen, steps=steps, learning_rate=args.learning_rate, seed=args.seed)
    seconds = time.perf_counter() - started
    simulated = mean_cosine(student, teacher, held_out)
    training.finish()
    after = mean_cosine(student, teacher, held_out)
    print(f"{steps} steps in {seconds:.0f} s")
    print(
        f"held-out topics, mean cosine with the teacher's embeddings, {ratio:.0%} of the numbers:"
    )
    print(f"  factors of the weights      {plain:.4f}")
    print(f"  factors of their results    {whitened:.4f}")
    print(f"  trained, as pairs of layers {simulated:.4f}")
    print(f"  trained, packed             {after:.4f}")
    print(filbert.factorization_report(student))
    return 0 if after > (plain if args.smoke else whitened) else 1  # eight steps are few


if __name__ == "__main__":
    sys.exit(main())
