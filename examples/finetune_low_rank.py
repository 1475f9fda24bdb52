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

from following import Lesson, add_arguments, mean_cosine

import filbert
from filbert.compress.lowrank import FactorTraining


def main(argv: list[str] | None = None) -> int:
    """Runs the example; 1 where training did not help."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--param-ratio", type=float, default=0.5, metavar="SHARE")
    add_arguments(parser, 3e-4)
    args = parser.parse_args(argv)
    lesson = Lesson.of(args)
    teacher, held_out = lesson.teacher, lesson.held_out
    calibration = lesson.calibration(12)
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
    simulated, after = lesson.teach(student, training, args)
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
