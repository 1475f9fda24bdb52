"""CUDA graphs by token count: a whole encoder as one launch, for small batches.

A short text keeps a GPU busy for microseconds and the host busy launching for milliseconds. A CUDA
graph launches everything at once, but for fixed shapes. Packed rows make that easy: their number is
the only shape there is. Each bucket is captured once, for so many rows; a call runs in the smallest
bucket that holds its tokens, the rows left over belong to no sequence, and which rows make a
sequence is data that the kernels read on the device.

Paper: ByteTransformer, arXiv 2210.03052, for the packed encoder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import ops
from .conversion.hugging_face.holders import module_of
from .conversion.in_place import owner_of
from .conversion.pooling import embed, unit_length
from .conversion.probe import allowed_difference
from .conversion.swap import SwappedEncoder
from .packed.batch import PackedBatch, mean_of_segments

__all__ = ["CapturedEncoder", "capture"]

#: rows of the static buffer of token data
_IDS, _POSITIONS, _TYPES = range(3)


class _Captured(Protocol):
    """One captured step: ``replay`` computes ``rows`` anew from what the static buffers hold."""

    rows: Tensor

    def replay(self) -> None: ...


class _Shared:
    """What the graphs of one runner share: memory, and two streams of their own. Libraries keep a
    workspace for each stream, and one that was taken outside of a capture is not the graph's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.warm_up, self.capture = torch.cuda.Stream(), torch.cuda.Stream()


class _CudaGraph:
    """A step as a CUDA graph."""

    def __init__(self, step: Callable[[], Tensor], shared: _Shared) -> None:
        with torch.cuda.device(shared.device):
            shared.warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(shared.warm_up):
                for _ in range(2):  # libraries choose kernels and load them at first use
                    step()
            torch.cuda.current_stream().wait_stream(shared.warm_up)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=shared.pool, stream=shared.capture):
                self.rows = step()

    def replay(self) -> None:
        self.graph.replay()


class CapturedEncoder:
    """What :func:`capture` returns: called with token ids, it replays the graph they fit.

    Attributes:
        buckets: row counts that were captured, ascending.
        max_sequences: the most sequences a graph can hold.
    """

    def __init__(
        self,
        model: nn.Module,
        buckets: Sequence[int],
        max_sequences: int,
        graph: Callable[[Callable[[], Tensor]], _Captured],
    ) -> None:
        self.model = model
        self.encoder, self._embed_rows = _front_of(model)
        self.buckets = tuple(sorted(set(buckets)))
        self.max_sequences = max_sequences
        self.device = next(self.encoder.packed_layers.buffers()).device
        self._layers = self.encoder.packed_layers
        self._places = self._embed_rows.places()
        # What a call changes: where sequences begin, then three rows of token data. All in one, so
        # that one copy brings it. Zeros are a valid call.
        size = self._static_size(self.buckets[-1])
        with torch.no_grad():
            self._static = torch.zeros(size, dtype=torch.int64, device=self.device)
            # The largest first: the others fit in the memory that it leaves to the pool.
            self._graphs = {
                size: graph(lambda size=size: self._step(size))  # type: ignore[misc]
                for size in reversed(self.buckets)
            }

    def _step(self, size: int) -> Tensor:
        """The encoder on the first ``size`` rows of the static buffers: what a graph holds."""
        ends = self._static[: self.max_sequences + 1]
        # [3, 1, size]: one row of tokens, whoever they belong to
        tokens = self._static[self.max_sequences + 1 : self._static_size(size)].view(3, 1, size)
        hidden = self._embed_rows(tokens[_IDS], tokens[_POSITIONS], tokens[_TYPES])
        batch = PackedBatch(  # anew in each step, so that its work list is part of the graph
            indices=tokens[_IDS, 0],  # only their number counts here
            cu_seqlens=ends.int(),
            positions=tokens[_POSITIONS, 0],
            max_seqlen=size,
            batch_size=self.max_sequences,
            seq_len=size,
        )
        return self.encoder.forward_packed(hidden[0].to(self.encoder.compute_dtype), batch)

    def _static_size(self, size: int) -> int:
        """How much of the static buffer a bucket reads."""
        return self.max_sequences + 1 + 3 * size

    def _upload(self, values: Tensor) -> Tensor:
        """``values`` on the device, copied without anyone waiting."""
        if self.device.type != "cuda":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def bucket_of(self, tokens: int, sequences: int = 1) -> int | None:
        """The bucket that a call with so many tokens and sequences runs in; None if it fits none
        and runs without a graph."""
        if sequences > self.max_sequences:
            return None
        return next((size for size in self.buckets if tokens <= size), None)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling: str | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Runs the encoder. A call that fits no bucket runs packed, without a graph.

        Args:
            input_ids: ``[B, S]`` integers. On the CPU, as a tokenizer gives them: the host must
                know how many tokens there are, and for tensors on the GPU it has to wait.
            attention_mask: ``[B, S]``, nonzero keeps the token; all are kept if not given.
            token_type_ids: ``[B, S]`` for models that have them; zeros if not given.
            pooling: None for the hidden states; ``"mean"`` over the kept tokens, or ``"cls"``, the
                first kept token.
            normalize: scale each pooled embedding to length 1.

        Returns:
            ``[B, S, N]`` in the model's dtype, zeros where padding was; or ``[B, N]`` with
            ``pooling``, zeros for a text without tokens. A task head is not run.

        Raises:
            ValueError: shapes or a ``pooling`` that do not fit.
            RuntimeError: the model was converted, moved, loaded anew or written in place after the
                capture.
        """
        if pooling not in (None, "mean", "cls"):
            raise ValueError(f"pooling: got {pooling!r}, need None, 'mean' or 'cls'")
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S]")
        for name, given in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(given.shape)}, need {tuple(input_ids.shape)} like "
                    "input_ids"
                )
        packed_anew = self.encoder._modules.get("packed_layers") is not self._layers
        if packed_anew or self._embed_rows.places() != self._places:
            raise RuntimeError(
                "the model's weights were packed anew or moved since they were captured; "
                "try filbert.capture(model, ...) again"
            )
        self.encoder.check_unwritten()
        with torch.no_grad():
            ids = input_ids.cpu()
            mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
            batch = PackedBatch.from_mask(mask)
            size = self.bucket_of(batch.num_rows, batch.batch_size)
            if size is None:
                return self._without_graph(
                    input_ids, attention_mask, token_type_ids, pooling, normalize
                )
            if pooling is None:
                places = self._upload(batch.places)  # before the graph, so that it waits for nobody
                rows = self._replay(size, ids, token_type_ids, batch)
                padded = ops.gather_rows(rows, places).to(self.encoder.model_dtype)
                return padded.view(batch.batch_size, batch.seq_len, rows.shape[1])
            pooled = self._pooled(size, ids, token_type_ids, batch, pooling)
            return (unit_length(pooled) if normalize else pooled).to(self.encoder.model_dtype)

    def _replay(
        self, size: int, ids: Tensor, token_type_ids: Tensor | None, batch: PackedBatch
    ) -> Tensor:
        """The bucket's rows ``[size, N]`` in the compute dtype, valid until the next call."""
        host = torch.zeros(self._static_size(size), dtype=torch.int64, device="cpu")
        host[: self.max_sequences + 1] = batch.num_rows  # sequences that are not there are empty
        host[: batch.batch_size + 1] = batch.cu_seqlens
        tokens = host[self.max_sequences + 1 :].view(3, size)[:, : batch.num_rows]
        tokens[_IDS] = ids.flatten()[batch.indices]
        tokens[_POSITIONS] = _position_ids(self._embed_rows.positions, ids).flatten()[batch.indices]
        if token_type_ids is not None:
            tokens[_TYPES] = token_type_ids.cpu().flatten()[batch.indices]
        self._embed_rows.check(tokens)
        if self.device.type == "cuda":
            host = host.pin_memory()  # or the copy would wait
        self._static[: len(host)].copy_(host, non_blocking=True)
        graph = self._graphs[size]
        graph.replay()
        return graph.rows

    def _pooled(
        self, size: int, ids: Tensor, types: Tensor | None, batch: PackedBatch, pooling: str
    ) -> Tensor:
        if pooling == "cls":
            first = self._upload(batch.starts)
            return ops.gather_rows(self._replay(size, ids, types, batch), first)
        lengths = self._upload(batch.lengths)
        rows = self._replay(size, ids, types, batch)[: batch.num_rows]
        return mean_of_segments(rows, lengths)

    def _without_graph(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        pooling: str | None,
        normalize: bool,
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        moved = {k: None if v is None else v.to(self.device) for k, v in inputs.items()}
        if pooling is not None:
            return embed(self.model, **moved, pooling=pooling, normalize=normalize)  # type: ignore[arg-type]
        rows, batch = embed(self.model, **moved, pooling="none")  # type: ignore[arg-type]
        return batch.unpack(rows)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "CapturedEncoder: its CUDA graphs belong to this process and these buffers, and cannot "
            "be copied, saved or sent; try copying the model and filbert.capture(copy, ...)"
        )

    def __repr__(self) -> str:
        return (
            f"CapturedEncoder({type(self.model).__name__}, buckets={self.buckets}, "
            f"max_sequences={self.max_sequences})"
        )


class _EmbedRows:
    """The model's own embeddings, called with one long row of tokens and their positions.

    Positions are given and not counted, because the tokens of several texts lie in one row.
    """

    def __init__(self, owner: nn.Module) -> None:
        who = type(owner).__name__
        embeddings = getattr(owner, "embeddings", None)
        if not isinstance(embeddings, nn.Module):
            raise ValueError(
                f"{who}: got no module 'embeddings', need one to capture it; "
                "try the converted model without a graph"
            )
        parameters = inspect.signature(embeddings.forward).parameters
        if not {"input_ids", "position_ids"} <= set(parameters):
            raise ValueError(
                f"{who}.embeddings: got a forward without position_ids, need it to give each text "
                "its own positions; try a newer transformers, or do without a graph"
            )
        self.embeddings = embeddings
        self.project = getattr(owner, "embeddings_project", None)  # ELECTRA's
        self.with_types = "token_type_ids" in parameters
        self.positions = getattr(embeddings, "position_embeddings", None)

    def places(self) -> list[int]:
        """Where every weight lies in memory: a graph holds these addresses."""
        modules = [m for m in (self.embeddings, self.project) if isinstance(m, nn.Module)]
        return [t.data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())]

    def table(self, name: str) -> nn.Embedding | None:
        found = getattr(self.embeddings, name, None)
        return found if isinstance(found, nn.Embedding) else None

    def check(self, tokens: Tensor) -> None:
        """Raises ValueError for what is in no table: a graph would read past its end."""
        names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
        for values, name in zip(tokens, names, strict=True):
            table = self.table(name)
            if table is None or values.numel() == 0:
                continue
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= table.num_embeddings:
                raise ValueError(
                    f"{name}: got indices from {low} to {high}, need 0 to "
                    f"{table.num_embeddings - 1}; try truncating the texts, or the model's own "
                    "tokenizer"
                )

    def __call__(self, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        extra = {"token_type_ids": types} if self.with_types else {}
        hidden = self.embeddings(input_ids=ids, position_ids=positions, **extra)
        return hidden if self.project is None else self.project(hidden)


def _position_ids(table: Any, ids: Tensor) -> Tensor:
    """``[B, S]``: BERT counts places; RoBERTa counts tokens, from behind its padding index."""
    padding = getattr(table, "padding_idx", None)
    if padding is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    is_token = ids != padding
    return is_token.cumsum(1) * is_token + padding


def _front_of(model: nn.Module) -> tuple[SwappedEncoder, _EmbedRows]:
    encoders = [(n, m) for n, m in model.named_modules() if isinstance(m, SwappedEncoder)]
    if len({id(m) for _, m in encoders}) != 1:
        raise ValueError(
            f"model: got {type(model).__name__} with {len(encoders)} packed encoders, need one; "
            "try filbert.convert(model)"
        )
    name, encoder = encoders[0]
    if not encoder.is_packed:
        raise ValueError("model: its encoder cannot run: " + "; ".join(encoder.refusals))
    if encoder.masked_rows != "zero":
        raise ValueError(
            f"model: got one converted with masked_rows={encoder.masked_rows!r}, need 'zero', as a "
            "graph runs the kept tokens only; try the converted model without a graph"
        )
    owner = owner_of(model, name)
    assert owner is not None  # an encoder is never the model itself, convert sees to that
    return encoder, _EmbedRows(owner)


def capture(
    model: nn.Module,
    buckets: Sequence[int] = (32, 64, 128, 256, 512),
    *,
    max_sequences: int = 32,
) -> CapturedEncoder:
    """Captures a converted model's embeddings and encoder as CUDA graphs, one for each bucket.

    For batches so small that the time goes into launching kernels. The runner is then called
    instead of the model::

        model = filbert.convert(model.cuda().half())
        runner = filbert.capture(model, buckets=(32, 128, 512))
        hidden = runner(input_ids, attention_mask)   # tensors on the CPU

    Every bucket is compared with the model before the runner is returned. It holds the model's
    weights where they are: after moving, casting or loading them, capture again. Calls share its
    buffers, so it is not for several threads at once, nor for several streams that do not wait for
    each other.

    Args:
        model: a model on a CUDA device that :func:`filbert.convert` converted, with one encoder.
        buckets: total numbers of tokens to capture, each at least 1. A call takes the smallest that
            holds all its tokens; the GEMMs run on that many rows.
        max_sequences: the most texts in a call that a graph can run.

    Raises:
        ValueError: no buckets or sequences, a model that is not on a CUDA device, not converted, or
            whose embeddings take no positions.
        RuntimeError: the runner's result differs from the model's.
    """
    sizes = list(buckets)
    if not sizes or min(sizes) < 1 or max_sequences < 1:
        raise ValueError(
            f"buckets, max_sequences: got {sizes} and {max_sequences}, need token counts and a "
            "number of sequences of 1 or more"
        )
    model = module_of(model, "capture")
    encoder, _ = _front_of(model)
    device = next(encoder.packed_layers.buffers()).device
    if device.type != "cuda":
        raise ValueError(
            f"model: got one on {device}, need a CUDA device, whose graphs these are; "
            "try filbert.convert(model.cuda().half())"
        )
    shared = _Shared(device)
    runner = CapturedEncoder(model, sizes, max_sequences, lambda step: _CudaGraph(step, shared))
    prove(runner)
    return runner


def prove(runner: CapturedEncoder) -> None:
    """Raises RuntimeError unless the runner and the model agree, on a batch in every bucket."""
    words = runner._embed_rows.table("word_embeddings")
    places = runner._embed_rows.table("position_embeddings")
    vocabulary = 2 if words is None else words.num_embeddings
    longest = runner.buckets[-1]
    if places is not None:  # RoBERTa's positions begin behind its padding index
        first = 0 if places.padding_idx is None else places.padding_idx + 1
        longest = places.num_embeddings - first
    generator = torch.Generator().manual_seed(0)
    for size in runner.buckets:
        lengths = _lengths(size, longest, runner.max_sequences)
        if runner.bucket_of(sum(lengths), len(lengths)) != size:
            continue  # so many tokens do not fit in so many texts
        with torch.device("cpu"):
            shape = (len(lengths), max(lengths))
            ids = torch.randint(vocabulary // 2, vocabulary, shape, generator=generator)
            mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
        ours = runner(ids, mask)
        rows, batch = embed(runner.model, ids.to(runner.device), mask.to(runner.device), "none")
        want = batch.unpack(rows)
        worst, allowed = float((ours - want).abs().max()), allowed_difference(want)
        if not worst <= allowed:
            raise RuntimeError(
                f"capture: the result for {size} rows differs from the model's by {worst:.3g}, "
                f"allowed {allowed:.3g}; try the converted model without a graph"
            )


def _lengths(total: int, longest: int, most: int) -> list[int]:
    """Falling lengths of at most ``most`` texts that sum to ``total``, or to what fits."""
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0 and len(lengths) < most:
        last = len(lengths) == most - 1
        lengths.append(min(longest, left if last else -(-left * 2 // 3)))
    return lengths
