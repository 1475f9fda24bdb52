"""`attn_varlen`: fused attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _load
from .shared import calling
from .shared.dtypes import wide_dtype
from .shared.operator import Operator, register


def head_dims(device: torch.device) -> range:
    """The head dimensions that the kernels of :func:`attn_varlen` have on ``device``. Smaller ones
    and those between are padded with zeros for each call. As in csrc/args/attn_varlen.h, to which
    the tests hold it."""
    return range(8, 129, 8) if device.type == "cuda" else range(1, 257)


def attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    key_bias: Tensor | None = None,
    tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused multi-head attention over packed sequences of different lengths.

    Sequence ``s`` owns the query rows ``cu_seqlens_q[s]:cu_seqlens_q[s+1]`` and attends to the key
    rows ``cu_seqlens_k[s]:cu_seqlens_k[s+1]``, and to no others: nothing is padded, and rows of
    other sequences cannot reach its result, whatever they hold. The result of a sequence is bitwise
    the same alone and in any batch.

    Args:
        q: ``[Tq, H, D]``, float32 or bfloat16, on CUDA also float16. Any strides with a contiguous
            last dimension, so the three views of one QKV buffer need no copy. ``D`` is 1 to 256 on
            the CPU and 1 to 128 on CUDA, where operands whose ``D`` is no multiple of 8 are copied
            with zeros up to the next one.
        k: ``[Tk, H, D]``, dtype of ``q``.
        v: ``[Tk, H, D]``, dtype of ``q``.
        cu_seqlens_q: ``[B+1]`` int32 on the device of ``q``; starts at 0, never falls, ends at most
            at ``Tq``. Rows past its end are no sequence's: their output is 0 and their lse -inf.
            On CUDA nobody waits to read them: wrong offsets are clamped and give wrong results.
        cu_seqlens_k: ``[B+1]`` int32, the same for ``k`` and ``v``.
        max_seqlen_q: length of the longest query sequence; a hint, results never depend on it.
        max_seqlen_k: length of the longest key sequence, likewise.
        scale: factor on ``q·k``, usually ``D ** -0.5``.
        alibi_slopes: ``[H]`` float32; adds ``-slope * |j - i|`` to the score of query ``i`` and key
            ``j``, counted so that the last query and the last key of a sequence coincide.
        window: ``(left, right)``: a query sees keys at most ``left`` before and ``right`` after its
            own place; ``-1`` is no bound.
        key_bias: ``[Tk]`` float32 added to every score of that key; ``-inf`` hides the key.
        tiles: what :func:`attn_tiles` made of these very offsets and rows, so that the layers of
            one forward share it; made anew if not given. Rows that another list lacks are left
            unwritten. CUDA only, ignored on the CPU.

    Returns:
        ``out`` ``[Tq, H, D]`` in the dtype of ``q``, and ``lse`` ``[H, Tq]`` float32, the natural
        logarithm of the softmax denominators. A query that sees no key has ``out`` 0, ``lse`` -inf.

    Raises:
        RuntimeError: shapes, dtypes, devices or ``cu_seqlens`` that do not fit; the message says
            what, got, need and try.

    Paper: ByteTransformer, arXiv 2210.03052.
    """
    if not calling.compiled("attn_varlen", q):
        calling.one_device(
            "attn_varlen", q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            alibi_slopes=alibi_slopes, key_bias=key_bias, tiles=tiles,
        )  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, key_bias)
        return reference_attn_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
            alibi_slopes, window, key_bias,
        )  # fmt: skip
    return calling.kernels().attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
        alibi_slopes, window[0], window[1], key_bias, tiles,
    )  # fmt: skip


def reference_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.attn_varlen`: one dense attention per sequence."""
    del max_seqlen_q, max_seqlen_k  # hints for kernels; the answer never depends on them
    wide = wide_dtype(q.dtype)
    heads = q.shape[1]
    out = torch.zeros(q.shape[0], heads, v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.full((heads, q.shape[0]), float("-inf"), dtype=wide, device=q.device)
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(q_ends) - 1):
        q0, q1, k0, k1 = q_ends[s], q_ends[s + 1], k_ends[s], k_ends[s + 1]
        if q1 == q0 or k1 == k0:
            continue
        qs, ks, vs = (t.to(wide).transpose(0, 1) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        scores = qs @ ks.transpose(1, 2) * scale  # [H, Lq, Lk]
        # Both ends are aligned: the last query looks straight at the last key.
        row = torch.arange(q1 - q0, device=q.device)[:, None] + (k1 - k0) - (q1 - q0)
        distance = torch.arange(k1 - k0, device=q.device)[None, :] - row
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.to(wide)[:, None, None] * distance.abs()
        if key_bias is not None:
            scores = scores + key_bias[k0:k1].to(wide)
        left, right = window
        if left >= 0:
            scores = scores.masked_fill(distance < -left, float("-inf"))
        if right >= 0:
            scores = scores.masked_fill(distance > right, float("-inf"))
        top = scores.amax(-1, keepdim=True)
        top = torch.where(top == float("-inf"), 0.0, top)  # a row that sees no key stays all zero
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        values = weights @ vs / torch.where(total == 0, 1.0, total)
        out[q0:q1] = values.transpose(0, 1).to(q.dtype)
        lse[:, q0:q1] = (total.log() + top).squeeze(-1)
    return out, lse


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> None:
    """Raises where the compiled operator would: slices of wrong offsets would be other sequences'
    rows, silently."""
    fit = q.ndim == 3 and k.shape == v.shape and k.shape[1:] == q.shape[1:]
    rules = [
        (fit, "q, k, v", "[T, H, D] each, k and v alike", "the same heads for q, k and v"),
        (k.dtype == q.dtype == v.dtype, "dtype of k and v", f"{q.dtype}, as q", "one dtype"),
        (cu_seqlens_q.shape == cu_seqlens_k.shape, "cu_seqlens", "one length", "equal batches"),
    ]
    for name, t, size in (
        ("alibi_slopes", alibi_slopes, q.shape[1]),
        ("key_bias", key_bias, len(k)),
    ):
        ok = t is None or (t.dtype == torch.float32 and t.shape == (size,))
        rules.append((ok, name, f"float32 [{size}]", "a tensor of the right length"))
    for name, cu, rows in (
        ("cu_seqlens_q", cu_seqlens_q, len(q)),
        ("cu_seqlens_k", cu_seqlens_k, len(k)),
    ):
        ok = cu.dtype == torch.int32 and cu.ndim == 1 and cu.numel() > 0
        ok = ok and int(cu[0]) == 0 and bool((cu.diff() >= 0).all()) and int(cu[-1]) <= rows
        need = f"int32 offsets that start at 0, never fall and end at {rows} at most"
        rules.append((ok, name, need, "prefix sums of the lengths with a leading 0"))
    for ok, what, need, hint in rules:
        if not ok:
            raise RuntimeError(f"attn_varlen: {what}; got something else; need {need}; try {hint}")


def _fake_attn_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, scale, slopes=None, left=-1, right=-1, key_bias=None,
    tiles=None,
):  # fmt: skip
    calling.one_device(
        "attn_varlen", q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        alibi_slopes=slopes, key_bias=key_bias, tiles=tiles,
    )  # fmt: skip
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _explain_attn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any, **__: Any
) -> dict:
    assert _load.C is not None
    if q.is_cuda:
        padded = q.shape[2] + -q.shape[2] % head_dims(q.device).step
        plan = _load.C.plan_attn_varlen_cuda(
            rows_q=q.shape[0], sequences=cu_seqlens_q.shape[0] - 1, heads=q.shape[1],
            dim=padded, float32=q.dtype == torch.float32,
            self_attention=q.shape[0] == k.shape[0]
            and cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr(),
        )  # fmt: skip
        return {
            "launch": f"at most {plan['blocks']:,} blocks of {plan['threads']} threads, whatever "
            "the lengths; those past the end of the work list return at once",
            "shared memory": f"{plan['shared_bytes']:,} bytes a block",
            "columns": f"{q.shape[2]} of {plan['tile_dim']} in a tile"
            + (f", by copies of {padded}" if padded != q.shape[2] else ""),
            "memory": f"{_attn_bytes(q, k):,} bytes read and written",
        }
    threads = torch.get_num_threads()
    plan = _load.C.plan_attn_varlen(
        cu_q=cu_seqlens_q.tolist(), cu_k=cu_seqlens_k.tolist(), heads=q.shape[1], dim=q.shape[2],
        bf16=q.dtype == torch.bfloat16, threads=threads,
    )  # fmt: skip
    return {
        "tasks": f"{len(plan['tasks'])} for {threads} threads, "
        f"{plan['heads_per_task']} heads of one sequence each, largest first",
        "longest keys": plan["longest_k"],
        "scratch": f"{plan['scratch_bytes']:,} bytes for each thread",
        "work": f"{2 * plan['multiply_adds']:,} floating-point operations",
        "memory": f"{_attn_bytes(q, k):,} bytes read and written",
    }


def _attn_bytes(q: Tensor, k: Tensor) -> int:
    """q, k and v read once, the output written once."""
    return 2 * (q.shape[0] + k.shape[0]) * q.shape[1] * q.shape[2] * q.element_size()


register(
    Operator(
        "attn_varlen",
        "packed variable-length fused attention",
        fake=_fake_attn_varlen,
        reference=reference_attn_varlen,
        explain=_explain_attn_varlen,
    )
)
