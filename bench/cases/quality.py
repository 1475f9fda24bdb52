"""What weights of few bits lose: the real MiniLM on passages that calibration has not seen.

No times. Embeddings are compared with those of the float model: the mean cosine, and how often a
search for a passage by one of its sentences finds the same passage first.
"""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ours import compiled_filbert
from ..results import Row
from ..runner import Options, matching, say
from ..timing import Unavailable
from ..workloads import MINILM, _corpus, minilm_folder, model

#: of all weights, or by patterns of their names
Bits = int | dict[str, int | None]

NAME = "quality"
ABOUT = "cosine and search agreement of MiniLM with weights of few bits, on held-out passages"
REFERENCE = "float32"
RATE = ("cosine", "mean cosine", 1.0)
#: passages for calibration; all others are held out
CALIBRATION = 320
#: bits, group, method, bits of embeddings
CONTESTANTS: dict[str, tuple[Bits, int | str | None, str, int | None]] = {
    "8 bits": (8, None, "mse", None),
    "8 bits, GPTQ": (8, None, "gptq", None),
    "6 bits, GPTQ": (6, None, "gptq", None),
    "4 bits, groups of 64": (4, 64, "mse", None),
    "4 bits, groups of 64, HQQ": (4, 64, "hqq", None),
    "4 bits, a scale for each output, GPTQ": (4, None, "gptq", None),
    "4 bits, groups of 64, GPTQ": (4, 64, "gptq", None),
    "4 bits, groups of 64, GPTQ, embeddings 8 bits": (4, 64, "gptq", 8),
    "4 bits, groups of 32, GPTQ": (4, 32, "gptq", None),
    "3 bits, groups of 64, GPTQ": (3, 64, "gptq", None),
    "2 bits, groups of 64, GPTQ": (2, 64, "gptq", None),
    # The same bytes as 2.5 bits on average, by no measure.
    "3 bits in the lower half, 2 in the upper": (
        {r"re:layer\.[0-2]\.": 3, "re:.*": 2},
        64,
        "gptq",
        None,
    ),
}
#: bits on average, measure of sensitivity; by GPTQ and with groups of 64, as uniform bits above
PLANNED = {
    "4 bits on average, by trace": (4.0, "trace"),
    "3 bits on average, by trace": (3.0, "trace"),
    "3 bits on average, by eigenvalue": (3.0, "eigenvalue"),
    "3 bits on average, by results": (3.0, "results"),
    "2.5 bits on average, by trace": (2.5, "trace"),
    "2.5 bits on average, by results": (2.5, "results"),
}
#: passages that sensitivity is measured on
FEW = 8
WORKLOADS = {name: name for name in ("minilm-help",)}


def _embed(bert: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    found = []
    with torch.inference_mode():
        for at in range(0, len(texts), 32):
            batch = tokenizer(
                texts[at : at + 32], padding=True, truncation=True, max_length=256,
                return_tensors="pt",
            )  # fmt: skip
            hidden = bert(**batch).last_hidden_state
            kept = batch["attention_mask"].unsqueeze(-1)
            found.append((hidden * kept).sum(1) / kept.sum(1))
    return F.normalize(torch.cat(found), dim=-1)


def _longest_sentence(text: str) -> str:
    """Not the first one, which often is a heading."""
    return max(re.split(r"(?<=[.!?])\s+", text)[1:] or [text], key=len)


class HeldOut:
    """The real MiniLM, passages that a compressed one may see, and others that it is measured on.

    Raises:
        Unavailable: no compiled filbert, or no model.
    """

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.filbert = compiled_filbert()
        self.tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        texts = [passage.text for passage in _corpus().help_passages()]
        random.Random(0).shuffle(texts)
        self.seen, self._held = texts[:CALIBRATION], texts[CALIBRATION:]
        self._questions = [_longest_sentence(text) for text in self._held]
        self.base = model(MINILM)
        self._right, asked = self._embeddings(self.base)
        self._first = (asked @ self._right.T).argmax(-1)

    def _embeddings(self, bert: Any) -> tuple[Tensor, Tensor]:
        passages, questions = (
            _embed(bert, self.tokenizer, part) for part in (self._held, self._questions)
        )
        return passages, questions

    def row(self, name: str, bert: Any, nbytes: float) -> Row:
        """What ``bert`` loses."""
        ours, asked = self._embeddings(bert)
        cosine = (ours * self._right).sum(-1)
        row = Row("minilm-help", "float32", name, REFERENCE, "ok", error=0.0)
        row.figures |= {
            "cosine": float(cosine.mean()),
            "least_cosine": float(cosine.min()),
            "same_first": float(((asked @ ours.T).argmax(-1) == self._first).float().mean()),
            "bytes": float(nbytes),
        }
        return row

    def reference(self) -> Row:
        """The float model's."""
        size = sum(p.numel() * 4 for p in self.base.parameters())
        row = Row("minilm-help", "float32", REFERENCE, REFERENCE, "ok", error=0.0)
        row.figures |= {"cosine": 1.0, "least_cosine": 1.0, "same_first": 1.0, "bytes": float(size)}
        return row


def run(options: Options) -> list[Row]:
    """Quantizes the model anew for every contestant asked for."""
    from filbert.compress.quantize import plan_bits

    try:
        given = HeldOut()
    except Unavailable as error:
        return [Row("minilm-help", "float32", REFERENCE, REFERENCE, "unavailable", str(error))]
    filbert, tokenizer, base, seen = given.filbert, given.tokenizer, given.base, given.seen
    rows = [given.reference()]
    for name in matching([*CONTESTANTS, *PLANNED], options.baselines or ("*",), "--baseline"):
        if not options.wants(f"minilm-help/float32/{name}"):
            continue
        say(f"  quantizing: {name}")
        bits: Bits
        if name in PLANNED:
            average, measure = PLANNED[name]
            plan = plan_bits(
                copy.deepcopy(base), seen if measure == "results" else seen[:FEW],
                avg_bits=average, measure=measure, tokenizer=tokenizer,
            )  # fmt: skip
            bits, group, method, embed_bits = plan.bits, "auto", "gptq", None
        else:
            bits, group, method, embed_bits = CONTESTANTS[name]
        smaller = filbert.quantize(
            copy.deepcopy(base), bits, group=group, method=method, embed_bits=embed_bits,
            calibration=seen if method == "gptq" else None, tokenizer=tokenizer,
        )  # fmt: skip
        rows.append(given.row(name, smaller, filbert.quantization_report(smaller).nbytes))
    return rows
