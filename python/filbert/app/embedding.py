"""From a file of texts to a file of embeddings: the resumable job behind ``filbert embed``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .embedder import Embedder, ModelFolder
from .outputlock import OutputLock
from .rowstore import RowStore, require_pyarrow
from .textfile import EmbedError, TextFile

__all__ = [
    "BATCH_TOKENS",
    "EmbedError",
    "EmbedJob",
    "EmbedResult",
    "Embedder",
    "ModelFolder",
    "plan_batches",
    "progress",
    "run_job",
]

#: tokens in one batch: enough rows for the GEMMs to run at full rate, few enough that what a layer
#: computes stays near the caches (MiniLM on Zen 3: 1024 to 4096 alike, 8192 about 5 % slower)
BATCH_TOKENS = 4096


def plan_batches(
    lengths: Sequence[int], *, batch_tokens: int | None = None, batch_size: int | None = None
) -> list[list[int]]:
    """Cuts texts into batches of like lengths, the longest first (memory peaks at the start).

    Args:
        lengths: tokens per text.
        batch_tokens: the most tokens in a batch, padding included; a longer text runs alone.
        batch_size: the most texts in a batch. At least one of the two bounds is needed.

    Returns:
        Lists of indices into ``lengths`` that hold every index once.
    """
    if batch_tokens is None and batch_size is None:
        raise ValueError("plan_batches: got no bound, need batch_tokens or batch_size")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for index in order:
        full = not batches or (
            (batch_size is not None and len(batches[-1]) >= batch_size)
            or (
                batch_tokens is not None
                and (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens
            )
        )
        if full:
            batches.append([])
        batches[-1].append(index)
    return batches


def progress(total: int, what: str, *, quiet: bool = False, initial: int = 0) -> Any:
    """A tqdm bar on stderr over ``total`` texts; in a log it prints a line now and then."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=what, unit=" texts", initial=initial, disable=quiet, file=sys.stderr,
        dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10,
    )  # fmt: skip


@dataclass(frozen=True)
class EmbedJob:
    """What ``filbert embed`` was asked to do; None means the model folder's own recipe.

    For ``format`` None goes by the input's name, for ``field`` it is ``"text"``.
    """

    model: Path
    input: Path
    output: Path
    pooling: Literal["mean", "cls"] | None = None
    normalize: bool | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    max_length: int | None = None
    dtype: str = "float32"
    field: str | None = None
    format: Literal["lines", "jsonl"] | None = None
    threads: int | None = None
    convert: bool = True
    restart: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class EmbedResult:
    """What a job did: ``rows`` in the output, of which ``new_rows`` (``tokens``) in this run."""

    rows: int
    dimension: int
    new_rows: int
    tokens: int
    seconds: float
    already_complete: bool


def _identity(job: EmbedJob, folder: ModelFolder, text: TextFile) -> dict[str, Any]:
    """Everything that decides the bytes of the output, versions and thread count included."""
    import torch

    from .. import __version__, _load

    return {
        **text.identity(),
        "model sha256": folder.sha256(),
        "pooling": job.pooling or folder.pooling,
        "normalize": folder.normalize if job.normalize is None else job.normalize,
        "max-length": job.max_length,
        "batch-size": job.batch_size,
        "batch-tokens": job.batch_tokens,
        "dtype": job.dtype,
        "convert": job.convert,
        "threads": torch.get_num_threads(),
        "filbert": __version__,
        "torch": str(torch.__version__),
        "transformers": metadata.version("transformers"),
        "tokenizers": metadata.version("tokenizers"),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "instruction set": _load.C.isa() if _load.C is not None else "none",
    }


def _check_output(output: Path) -> None:
    if output.suffix not in (".npy", ".parquet"):
        raise EmbedError(f"output: got {output}, need a name that ends in .npy or .parquet")
    if output.is_dir():
        raise EmbedError(f"output: got {output}, which is a folder; need a file name")
    if not output.parent.is_dir():
        raise EmbedError(
            f"output: the folder {output.parent} does not exist, need one that does; "
            f"try: mkdir -p {output.parent}"
        )
    if output.suffix == ".parquet":
        require_pyarrow()


def run_job(job: EmbedJob) -> EmbedResult:
    """Embeds every text of ``job.input`` into ``job.output``; a killed run is continued.

    The output is byte for byte the same however often the job was killed and begun again.

    Raises:
        EmbedError: the job cannot be done as asked, or another process is at work on this output;
            nothing is lost that an earlier run had done.
        filbert.ConvertError: the model cannot run packed; all reasons at once.
        OSError: the disk is full, or a file may not be read or written.
    """
    import torch

    _check_output(job.output)
    if job.batch_size is None and job.batch_tokens is None:
        job = replace(job, batch_tokens=BATCH_TOKENS)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    with OutputLock(job.output) as lock:
        return _run_locked(job, lock)


def _run_locked(job: EmbedJob, lock: OutputLock) -> EmbedResult:
    folder = ModelFolder.read(job.model)
    text = TextFile.scan(job.input, job.format, job.field)
    store = RowStore(lock, _identity(job, folder, text), text.rows)
    status = "new" if job.restart else store.status()
    if status == "complete":
        return EmbedResult(text.rows, store.dimension, 0, 0, 0.0, already_complete=True)
    lock.require()
    embedder = Embedder.load(
        folder,
        dtype=job.dtype,
        pooling=job.pooling,
        normalize=job.normalize,
        max_length=job.max_length,
        convert=job.convert,
    )
    started = time.perf_counter()
    try:
        store.begin(embedder.dimension, resume=status == "resume")
        before = store.rows_done
        tokens = _fill(store, text, embedder, job)
        store.finish()
    finally:
        store.close()
    seconds = time.perf_counter() - started
    return EmbedResult(text.rows, store.dimension, text.rows - before, tokens, seconds, False)


def _fill(store: RowStore, text: TextFile, embedder: Embedder, job: EmbedJob) -> int:
    """Embeds what the store does not have yet, chunk by chunk; returns the tokens it ran."""
    tokens = 0
    started = time.perf_counter()
    with progress(text.rows, "embedding", quiet=job.quiet, initial=store.rows_done) as bar:

        def on_batch(texts: int, count: int) -> None:
            nonlocal tokens
            tokens += count
            rate = tokens / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(texts)

        for chunk in text.chunks(store.input_offset, store.rows_done, embedder.max_length):
            ids = embedder.tokenize(chunk.texts)
            batches = plan_batches(
                [len(one) for one in ids],
                batch_tokens=job.batch_tokens,
                batch_size=job.batch_size,
            )
            rows = embedder.embed_ids(ids, batches, on_batch)
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if bad.size:
                raise EmbedError(
                    f"input: {job.input}, line {chunk.first_row + int(bad[0]) + 1}: its embedding "
                    f"is not finite in {job.dtype}, need finite numbers; try --dtype float32"
                )
            store.append(rows, chunk.end_offset)
    return tokens
