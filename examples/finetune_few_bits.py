"""Fine-tunes all-MiniLM-L6-v2 for weights of 2 bits on Python's help topics, and packs it.

    python examples/finetune_few_bits.py --steps 200 --out minilm-2-bits

The student starts from the teacher's weights and follows its hidden states while its weights are
rounded (Q-BERT, arXiv 1909.05840). The same number of bits without training, by GPTQ, is shown
beside it. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

from following import Lesson, add_arguments, mean_cosine

import filbert
from filbert.compress.quantize import StraightThrough


def main(argv: list[str] | None = None) -> int:
    """Runs the example; 1 where training did not help."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, choices=[2, 3, 4], default=2)
    add_arguments(parser, 2e-4)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="save the packed model there")
    args = parser.parse_args(argv)
    lesson = Lesson.of(args)
    teacher, held_out = lesson.teacher, lesson.held_out
    calibration = None if args.smoke else lesson.calibration(8)
    rounded = filbert.quantize(copy.deepcopy(teacher), args.bits, calibration=calibration)
    before = mean_cosine(rounded, teacher, held_out)
    student = copy.deepcopy(teacher)
    training = StraightThrough(student, args.bits)
    untrained = mean_cosine(student, teacher, held_out)
    simulated, after = lesson.teach(student, training, args)
    print(f"held-out topics, mean cosine with the teacher's embeddings, {args.bits} bits:")
    print(f"  rounded                {untrained:.4f}")
    print(f"  {'least squares' if args.smoke else 'GPTQ':<22} {before:.4f}")
    print(f"  trained, simulated     {simulated:.4f}")
    print(f"  trained, packed        {after:.4f}")
    print(f"{filbert.quantization_report(student).nbytes / 1e6:.1f} MB of quantized weights")
    if args.out is not None:
        filbert.save_quantized(student, args.out)
        loaded = filbert.load_quantized(args.out)
        print(f"saved {args.out}; loaded again: {mean_cosine(loaded, teacher, held_out):.4f}")
    return 0 if after > untrained else 1


if __name__ == "__main__":
    sys.exit(main())
