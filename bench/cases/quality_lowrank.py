"""What weights of low rank lose: the real MiniLM on passages that calibration has not seen.

No times. Budgets are shares of the numbers of the encoder's weights. Factors are of the weights
alone, of what the weights make of calibration passages, or those and fine-tuned on these passages:
a student that follows the hidden states and the vectors of the float model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..results import Row
from ..runner import Options, matching, say
from ..timing import Unavailable
from .quality import RATE, REFERENCE, WORKLOADS, HeldOut

__all__ = ["RATE", "REFERENCE", "WORKLOADS", "run"]

NAME = "quality_lowrank"
ABOUT = "cosine and search agreement of MiniLM with weights of low rank, on held-out passages"
BUDGETS = (0.75, 0.5, 0.25)
PLAIN, WHITENED, TRAINED = "of the weights", "of their results", "fine-tuned"
STEPS, BATCH, TOKENS, RATE_OF_LEARNING = 400, 16, 128, 5e-4


def _name(budget: float, how: str) -> str:
    return f"{budget:.0%} of the numbers, {how}"


CONTESTANTS = {_name(b, how): (b, how) for b in BUDGETS for how in (PLAIN, WHITENED, TRAINED)}
#: factors of their results, of few bits
OF_BITS = {_name(0.5, f"{WHITENED}, {bits} bits"): (0.5, bits) for bits in (8, 4)}


def _pooled(hidden: Tensor, kept: Tensor) -> Tensor:
    return (hidden * kept).sum(1) / kept.sum(1)


def _follow(student: Any, given: HeldOut) -> None:
    """Fine-tunes the student on what the float model makes of the passages it may see."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE_OF_LEARNING, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE_OF_LEARNING, total_steps=STEPS, pct_start=0.1
    )
    student.eval()  # without dropout, as its teacher
    for step in range(STEPS):
        chosen = torch.randint(len(given.seen), (BATCH,)).tolist()
        batch = given.tokenizer(
            [given.seen[i] for i in chosen], padding=True, truncation=True, max_length=TOKENS,
            return_tensors="pt",
        )  # fmt: skip
        kept = batch["attention_mask"].unsqueeze(-1)
        with torch.no_grad():
            right = given.base(**batch).last_hidden_state
        ours = student(**batch).last_hidden_state
        rows = kept.squeeze(-1).bool()
        cosine = F.cosine_similarity(_pooled(ours, kept), _pooled(right, kept))
        loss = F.mse_loss(ours[rows], right[rows]) / right[rows].var() + (1 - cosine.mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"    step {step}: loss {float(loss.detach()):.4f}")


def run(options: Options) -> list[Row]:
    """Factorizes the model anew for every contestant asked for."""
    try:
        given = HeldOut()
    except Unavailable as error:
        return [Row("minilm-help", "float32", REFERENCE, REFERENCE, "unavailable", str(error))]
    from filbert.compress.lowrank import FactorTraining

    filbert = given.filbert
    rows = [given.reference()]
    known = [*CONTESTANTS, *OF_BITS]
    for name in matching(known, options.baselines or ("*",), "--baseline"):
        if not options.wants(f"minilm-help/float32/{name}"):
            continue
        say(f"  factorizing: {name}")
        budget, how = CONTESTANTS.get(name) or (OF_BITS[name][0], WHITENED)
        bits = OF_BITS[name][1] if name in OF_BITS else None
        settings = {
            "param_ratio": budget, "tokenizer": given.tokenizer,
            "calibration": None if how == PLAIN else given.seen,
        }  # fmt: skip
        smaller = copy.deepcopy(given.base)
        if how == TRAINED:
            training = FactorTraining(smaller, **settings)
            _follow(smaller, given)
            training.finish()
        else:
            filbert.factorize(smaller, factor_bits=bits, **settings)
        numbers = sum(row.numbers for row in filbert.factorization_report(smaller).rows)
        rows.append(given.row(name, smaller, numbers * (bits or 32) / 8))
    return rows
