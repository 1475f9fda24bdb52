"""Packed batches: the rows that are tokens, without the rows that are padding.

A padded batch ``[B, S, ...]`` becomes packed rows ``[T, ...]``: the kept rows of the first
sequence, then those of the second, and so on. :class:`PackedBatch` holds where each row came from.

Paper: ByteTransformer, arXiv 2210.03052.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..refusals import refuse_recording

__all__ = ["PackedBatch"]

_NEVER_NEGATIVE = (torch.bool, torch.uint8)

#: additive masks say "drop" with -inf, finfo.min or -10000; what is milder is a bias, not a mask
_DROP = -1e3


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Where each packed row of a batch lies in the padded batch.

    Attributes:
        indices: ``[T]`` int64, the flat place of each packed row in ``[batch_size * seq_len]``.
        cu_seqlens: ``[batch_size + 1]`` int32; sequence ``b`` owns the packed rows
            ``cu_seqlens[b]:cu_seqlens[b+1]``.
        positions: ``[T]`` int64, 0, 1, 2... inside each sequence, counting kept rows only.
        max_seqlen: length of the longest sequence, in rows.
        batch_size: number of sequences; empty ones count.
        seq_len: padded length.
        key_bias: ``[T]`` float32, what :func:`filbert.attn_varlen` adds to every score of a row as
            a key, or None. See :meth:`keeping_every_row`.
    """

    indices: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    max_seqlen: int
    batch_size: int
    seq_len: int
    key_bias: Tensor | None = None

    @classmethod
    def from_mask(
        cls, mask: Tensor, batch_size: int | None = None, *, every_query: bool = False
    ) -> PackedBatch:
        """Reads a padding mask. Padding may be on the left, on the right or scattered.

        Args:
            mask: One of

                - ``[B, S]`` bool, integer or float: nonzero keeps the token;
                - ``[B|1, H|1, S|1, S]`` bool: True attends;
                - ``[B|1, H|1, S|1, S]`` float, added to the scores: 0 attends, -1000 or less
                  (Hugging Face uses the lowest finite value) does not.

            batch_size: the batch size where the mask's first dimension is 1 and stands for all.
            every_query: also the queries that are padding must see the kept keys and no others.

        Raises:
            TypeError: not a tensor, or a 4-D mask of integers.
            ValueError: another rank or shape; a 4-D mask whose kept queries do not all see the same
                keys (causal, block-diagonal, sliding window); additive values that are neither 0
                nor very negative (a bias); a 2-D mask with negative values.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"mask: got {type(mask).__name__}, need a tensor [B, S] or [B, H, S, S]; "
                "try the tokenizer's attention_mask (flex_attention's BlockMask cannot be read: "
                "try attn_implementation='sdpa')"
            )
        negative = None
        if mask.ndim == 2:
            keep = mask if mask.dtype == torch.bool else mask != 0
            negative = None if mask.dtype in _NEVER_NEGATIVE else (mask < 0).any()
        elif mask.ndim == 4:
            keep = _keep_of_4d(mask, every_query)
        else:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, need [B, S] or [B|1, H|1, S|1, S]; "
                "try the tokenizer's attention_mask"
            )
        if batch_size is not None and keep.shape[0] != batch_size:
            if keep.shape[0] != 1:
                raise ValueError(
                    f"mask: got {keep.shape[0]} sequences (shape {tuple(mask.shape)}), "
                    f"need {batch_size} or 1"
                )
            keep = keep.expand(batch_size, -1)
        return cls._from_keep(keep, negative)

    @classmethod
    def from_lengths(
        cls, lengths: Tensor | Sequence[int], seq_len: int | None = None
    ) -> PackedBatch:
        """Right padding: sequence ``b`` keeps its first ``lengths[b]`` rows.

        Args:
            lengths: ``[B]`` integers, 0 is allowed.
            seq_len: padded length; the longest length if not given.

        Raises:
            ValueError: lengths that are not one-dimensional integers in ``0..seq_len``.
        """
        sizes = torch.as_tensor(lengths, dtype=None if len(lengths) else torch.int64)
        if sizes.ndim != 1 or sizes.is_floating_point() or sizes.dtype == torch.bool:
            raise ValueError(
                f"lengths: got shape {tuple(sizes.shape)} {sizes.dtype}, need [B] integers"
            )
        low, high = (int(sizes.min()), int(sizes.max())) if len(sizes) else (0, 0)
        width = high if seq_len is None else seq_len
        if low < 0 or high > width:
            raise ValueError(
                f"lengths: got values from {low} to {high}, need 0 to {width}"
                + ("" if seq_len is None else "; try a larger seq_len")
            )
        return cls._from_keep(torch.arange(width, device=sizes.device) < sizes[:, None])

    @classmethod
    def full(cls, batch_size: int, seq_len: int, device: torch.device | None = None) -> PackedBatch:
        """A batch with no padding at all."""
        places = torch.arange(batch_size * seq_len, device=device)
        ends = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
        return cls(
            indices=places,
            cu_seqlens=ends,
            positions=places % seq_len if seq_len else places,
            max_seqlen=seq_len if batch_size else 0,
            batch_size=batch_size,
            seq_len=seq_len,
        )

    @classmethod
    def _from_keep(cls, keep: Tensor, wrong: Tensor | None = None) -> PackedBatch:
        """``wrong`` is a bool on the device: whether ``keep`` was read from an additive mask."""
        refuse_recording("a PackedBatch", keep, "the eager model that it was made for")
        batch_size, seq_len = keep.shape
        if keep.numel() == 0:
            return cls.full(batch_size, seq_len, keep.device)
        counts = keep.sum(1)
        # All that the host has to know, in one read: on a GPU it waits for it.
        facts = [counts.sum(), counts.max()] + ([] if wrong is None else [wrong.long()])
        total, longest, *bad = torch.stack(facts).tolist()
        if any(bad):
            raise ValueError(
                "mask: got a 2-D mask with negative values, need nonzero = keep, 0 = padding; try "
                "(mask == 0) if it is additive"
            )
        if total == batch_size * seq_len:
            return cls.full(batch_size, seq_len, keep.device)
        flat = keep.flatten()
        places = torch.where(flat, flat.cumsum(0) - 1, -1)
        # The inverse of places; what is padding goes to one more row, which is cut off.
        indices = places.new_empty(total + 1)
        indices.scatter_(
            0, places.masked_fill(~flat, total), torch.arange(flat.shape[0], device=keep.device)
        )
        indices = indices[:total]
        ends = torch.zeros(batch_size + 1, dtype=torch.int32, device=keep.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=ends[1:])
        starts = torch.repeat_interleave(
            ends[:-1].long(), counts, output_size=total
        )  # [T] first row of the sequence each row belongs to
        batch = cls(
            indices=indices,
            cu_seqlens=ends,
            positions=torch.arange(total, device=keep.device) - starts,
            max_seqlen=longest,
            batch_size=batch_size,
            seq_len=seq_len,
        )
        batch.__dict__["places"] = places
        return batch

    @cached_property
    def places(self) -> Tensor:
        """``[batch_size * seq_len]`` int64, the packed row of each padded place, -1 where padding
        is: the inverse of ``indices``."""
        places = self.indices.new_full((self.batch_size * self.seq_len,), -1)
        return places.index_copy_(
            0, self.indices, torch.arange(self.num_rows, device=self.indices.device)
        )

    @cached_property
    def tiles(self) -> Tensor | None:
        """What :func:`filbert.attn_tiles` makes of these sequences, for all layers of a forward;
        None on the CPU, whose kernels need no list."""
        if self.cu_seqlens.device.type != "cuda":
            return None
        return ops.attn_tiles(self.cu_seqlens, self.cu_seqlens, self.num_rows, self.num_rows)

    def keeping_every_row(self) -> PackedBatch:
        """The batch of all places, padding included, in which padding is no key: its rows are
        computed, and no other row sees them. Itself where nothing is padded."""
        if self._is_full:
            return self
        every = PackedBatch.full(self.batch_size, self.seq_len, self.indices.device)
        bias = torch.zeros(self.places.shape, dtype=torch.float32, device=self.indices.device)
        return replace(every, key_bias=bias.masked_fill_(self.places < 0, float("-inf")))

    def select(self, kept: Tensor) -> PackedBatch:
        """The batch of the rows that are kept, each of which still unpacks to where it was; what
        goes comes back as zeros. ``rows[kept]`` are its rows.

        Args:
            kept: ``[T]`` bool.

        Returns:
            A batch whose ``positions`` count the rows that are left, as those of any batch do.

        Raises:
            ValueError: another shape or dtype.

        Paper: Latency Adjustable Transformer Encoder, arXiv 2201.03327.
        """
        if kept.dtype != torch.bool or kept.shape != self.indices.shape:
            raise ValueError(
                f"kept: got {kept.dtype} {tuple(kept.shape)}, need bool [{self.num_rows}], one for "
                "each packed row"
            )
        before = torch.zeros(self.num_rows + 1, dtype=torch.int32, device=kept.device)
        torch.cumsum(kept, 0, dtype=torch.int32, out=before[1:])  # kept rows before each row
        ends = before[self.cu_seqlens.long()]
        lengths = ends.diff()
        longest = int(lengths.max()) if len(lengths) else 0
        starts = torch.repeat_interleave(ends[:-1].long(), lengths)
        return replace(
            self,
            indices=self.indices[kept],
            cu_seqlens=ends,
            positions=torch.arange(len(starts), device=kept.device) - starts,
            max_seqlen=longest,
            key_bias=None if self.key_bias is None else self.key_bias[kept],
        )

    @property
    def num_rows(self) -> int:
        """T, the number of packed rows."""
        return self.indices.shape[0]

    @property
    def padding_share(self) -> float:
        """The share of padded places that hold no token, 0 to 1; 0 for an empty batch."""
        places = self.batch_size * self.seq_len
        return 1.0 - self.num_rows / places if places else 0.0

    @property
    def lengths(self) -> Tensor:
        """``[batch_size]`` int32, kept rows of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def _is_full(self) -> bool:
        return self.num_rows == self.batch_size * self.seq_len

    def pack(self, x: Tensor) -> Tensor:
        """``[B, S, ...]`` to packed rows ``[T, ...]``; a view of ``x`` where nothing is padded.

        Raises:
            ValueError: ``x`` does not start with ``[batch_size, seq_len]``.
        """
        if x.shape[:2] != (self.batch_size, self.seq_len):
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, need [{self.batch_size}, {self.seq_len}, ...] "
                "as in the mask"
            )
        rows = x.flatten(0, 1)
        return rows if self._is_full else _take_rows(rows, self.indices)

    def unpack(self, rows: Tensor) -> Tensor:
        """Packed rows ``[T, ...]`` to ``[B, S, ...]``, zero where padding was; a view of ``rows``
        where nothing is padded.

        Raises:
            ValueError: ``rows`` does not have ``num_rows`` rows.
        """
        self._check_rows(rows)
        if not self._is_full:
            rows = _take_rows(rows, self.places)
        return rows.reshape(self.batch_size, self.seq_len, *rows.shape[1:])

    @property
    def starts(self) -> Tensor:
        """``[batch_size]`` int64, the packed row each sequence starts with, -1 for an empty one."""
        return self.cu_seqlens[:-1].long().masked_fill(self.lengths == 0, -1)

    def pool(self, rows: Tensor, pooling: str = "mean") -> Tensor:
        """One vector per sequence from packed rows ``[T, ...]``, without unpacking.

        Args:
            rows: ``[T, ...]`` floating point.
            pooling: ``"mean"`` of the kept rows (summed in float32 or wider), or ``"cls"``, the
                first kept row.

        Returns:
            ``[batch_size, ...]`` in the dtype of ``rows``; zeros for an empty sequence.

        Raises:
            ValueError: another ``pooling``, or ``rows`` without ``num_rows`` rows.
        """
        self._check_rows(rows)
        if pooling == "cls":
            return _take_rows(rows, self.starts)
        if pooling != "mean":
            raise ValueError(f"pooling: got {pooling!r}, need 'mean' or 'cls'")
        return mean_of_segments(rows, self.lengths)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            indices=self.indices.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            positions=self.positions.to(device),
            key_bias=None if self.key_bias is None else self.key_bias.to(device),
        )

    def _check_rows(self, rows: Tensor) -> None:
        if rows.shape[0] != self.num_rows:
            raise ValueError(
                f"rows: got shape {tuple(rows.shape)}, need [{self.num_rows}, ...] packed rows"
            )


def mean_of_segments(rows: Tensor, lengths: Tensor) -> Tensor:
    """The mean of the first ``lengths[0]`` rows, of the next ``lengths[1]``, and so on.

    ``[B, ...]`` in the dtype of ``rows``, zeros where the length is 0. Summed in float32 or wider,
    in the rows' order.
    """
    flat = _as_matrix(rows)
    wide = flat if rows.dtype == torch.float64 else flat.float()
    total = torch.segment_reduce(wide, "sum", lengths=lengths.long(), axis=0, unsafe=True)
    mean = total / lengths.clamp(min=1).unsqueeze(1)
    return mean.view(lengths.shape[0], *rows.shape[1:]).to(rows.dtype)


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[index]`` along the first dimension, zeros where the index is -1."""
    if rows.requires_grad and torch.is_grad_enabled():  # the kernel has no gradient
        taken = rows.index_select(0, index.clamp(min=0))
        return taken.masked_fill((index < 0).view(-1, *[1] * (rows.ndim - 1)), 0)
    shape = (index.shape[0], *rows.shape[1:])
    return ops.gather_rows(_as_matrix(rows), index).view(shape)


def _as_matrix(rows: Tensor) -> Tensor:
    """``[T, ...]`` as ``[T, N]`` with contiguous rows; a view where it can be one."""
    flat = rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)
    return flat if flat.shape[1] < 2 or flat.stride(1) == 1 else flat.contiguous()


def _keep_of_4d(mask: Tensor, every_query: bool) -> Tensor:
    """``[B|1, S]`` bool from a 4-D mask, reading every query row only where it is really stored."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"mask: got a 4-D {mask.dtype} mask, need bool (True attends) or float (added to the "
            "scores); try mask.bool()"
        )
    if mask.shape[2] not in (1, mask.shape[3]):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, need as many queries as keys, or 1; "
            "cross-attention cannot be packed"
        )
    # Hugging Face expands one row per sequence over heads and queries. Where that is only a stride
    # of 0 there is nothing to read; where it was written out, its rows must be proven equal.
    for dim in (1, 2):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    if mask.numel() == 0:
        return mask.new_ones((mask.shape[0], mask.shape[3]), dtype=torch.bool)
    if mask.shape[1] == mask.shape[2] == 1:
        return _attends(mask[:, 0, 0])
    # A minimum and a maximum are the cheapest way to compare all rows; on bool they are slow.
    numbers = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    low, high = numbers.amin((1, 2)), numbers.amax((1, 2))
    if torch.equal(low, high):
        return _attends(low.bool() if mask.dtype == torch.bool else low)
    attends = _attends(mask)
    keep = attends.any(2).any(1)  # [B, S]
    agrees = attends == keep[:, None, None, :]
    if mask.shape[2] > 1 and not every_query:  # what a dropped query would see does not matter
        agrees |= ~keep[:, None, :, None]
    if not bool(agrees.all()):
        raise ValueError(
            f"mask: got a 4-D mask {tuple(mask.shape)} whose queries see different keys (causal, "
            "block or windowed), need one set of kept tokens per sequence; try the tokenizer's "
            "2-D attention_mask, or filbert.revert(model) for this input"
        )
    return keep


def _attends(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    keep = mask == 0
    if not bool((keep | (mask <= _DROP)).all()):
        raise ValueError(
            f"mask: got an additive mask with values other than 0 and {_DROP:g} or less, which is "
            "a bias on the scores; need a padding mask; try a 2-D attention_mask"
        )
    return keep
