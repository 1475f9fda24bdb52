"""What a model takes on disk and in memory once it is loaded: BERT-base in floats and few bits.

Each is loaded from its folder in a fresh process. Resident memory is read before and after, with
everything imported and a tiny model loaded before, so what is counted is the model's.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..environment import ROOT
from ..ours import compiled_filbert
from ..results import Row, unavailable
from ..runner import Options, matching, say
from ..timing import Unavailable
from .memory import _give_back, _status

NAME = "footprint"
ABOUT = "bytes on disk and in memory of BERT-base in floats and few bits, loaded from a folder"
REFERENCE = "float32"
RATE = ("memory_bytes", "MB in memory", 1e-6)
WORKLOADS = {name: name for name in ("bert-base",)}
#: every fourth layer of 3 bits, the others of 2: 2.25 on average
MIXED = {r"re:layer\.(0|4|8)\.": 3, "re:.*": 2}
#: bits, group, bits of embeddings
FEW_BITS: dict[str, tuple[int | dict[str, int], int | None, int]] = {
    "8 bits": (8, None, 8),
    "4 bits, groups of 64": (4, 64, 8),
    "4 bits, a scale for each output": (4, None, 8),
    "3 bits, groups of 64": (3, 64, 8),
    "2 and 3 bits, groups of 64": (MIXED, 64, 8),
    "2 and 3 bits, groups of 64, embeddings 4 bits": (MIXED, 64, 4),
}


def _write(name: str, folder: Path, model: Callable[..., Any]) -> None:
    """Makes the folder of a contestant: random weights, so bits are chosen without a Hessian."""
    filbert = compiled_filbert()
    base = copy.deepcopy(model())  # models are kept
    if name == REFERENCE:
        base.save_pretrained(folder)
        return
    bits, group, embed_bits = FEW_BITS[name]
    filbert.quantize(base, bits, group=group, embed_bits=embed_bits, method="nearest")
    filbert.save_quantized(base, folder)


def _bert_base() -> Any:
    from ..workloads import WORKLOADS as ALL
    from ..workloads import model

    return model(ALL["query-bert-base"]().model)


def _tiny() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    return BertModel(BertConfig(**sizes, num_hidden_layers=1, vocab_size=99)).eval()


def _load(name: str, folder: str) -> Any:
    if name == REFERENCE:
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder).eval()
    return compiled_filbert().load_quantized(folder)


def _run(model: Any) -> None:
    import torch

    with torch.inference_mode():
        model(input_ids=torch.arange(8)[None])


def measure(name: str, small: str, folder: str) -> float:
    """Bytes that the model of a folder adds to this process, which should be fresh."""
    _run(_load(name, small))
    _give_back()
    before = _status("VmRSS")
    model = _load(name, folder)
    _run(model)  # pages of the file that are mapped are there only once they were read
    _give_back()
    return float(_status("VmRSS") - before)


def run(options: Options) -> list[Row]:
    """Writes and loads every contestant asked for, one process each."""
    try:
        compiled_filbert()
    except Unavailable as error:
        return [unavailable("bert-base", "float32", REFERENCE, REFERENCE, str(error))]
    rows: list[Row] = []
    for name in matching([REFERENCE, *FEW_BITS], options.baselines or ("*",), "--baseline"):
        if not options.wants(f"bert-base/float32/{name}"):
            continue
        say(f"  measuring {name}")
        with tempfile.TemporaryDirectory() as folder:
            small, whole = Path(folder) / "small", Path(folder) / "whole"
            _write(name, small, _tiny)
            _write(name, whole, _bert_base)
            size = sum(path.stat().st_size for path in whole.iterdir())
            command = [sys.executable, "-W", "ignore", "-m", "bench.cases.footprint", name]
            done = subprocess.run(
                [*command, str(small), str(whole)], capture_output=True, text=True, cwd=ROOT
            )
        if done.returncode:
            tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows.append(unavailable("bert-base", "float32", name, REFERENCE, tail[:200]))
            continue
        row = Row("bert-base", "float32", name, REFERENCE, "ok", error=0.0)
        row.figures["disk_bytes"] = float(size)
        row.figures["memory_bytes"] = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="one contestant, measured in this process")
    parser.add_argument("name")
    parser.add_argument("small")
    parser.add_argument("folder")
    given = parser.parse_args()
    print(json.dumps(measure(given.name, given.small, given.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
