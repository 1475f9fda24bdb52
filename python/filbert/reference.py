"""The meaning of every operator, in a few lines of eager PyTorch.

These functions are the oracle of the tests (fed with float64 they are the exact answer) and the
last resort when the compiled library cannot be loaded. They are written to be read, not to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attn_varlen", "bias_gelu_", "check_attn_varlen", "gather_rows", "norm_residual"]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and sums are kept in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
) -> tuple[Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.attn_varlen`: one dense attention per sequence."""
    del max_seqlen_q, max_seqlen_k  # hints for kernels; the answer never depends on them
    wide = _wide(q.dtype)
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


def check_attn_varlen(
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


def norm_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """Meaning of :func:`filbert.ops.norm_residual`: LayerNorm(x + bias + residual)."""
    wide = _wide(x.dtype)
    total = x.to(wide)
    if bias is not None:
        total = total + bias.to(wide)
    if residual is not None:
        total = total + residual.to(wide)
    mean = total.mean(-1, keepdim=True)
    centred = total - mean
    variance = centred.square().mean(-1, keepdim=True)
    return (centred * (variance + eps).rsqrt() * weight.to(wide) + beta.to(wide)).to(x.dtype)


def bias_gelu_(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """Meaning of :func:`filbert.ops.bias_gelu_`: x becomes GELU(x + bias), in place."""
    wide = _wide(x.dtype)
    total = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    return x.copy_(torch.nn.functional.gelu(total, approximate=approximate))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Meaning of :func:`filbert.ops.gather_rows`: row ``index[t]`` of x, or zeros."""
    valid = (index >= 0) & (index < x.shape[0])
    out = x.new_zeros((index.shape[0], x.shape[1]))
    out[valid] = x[index[valid]]
    return out
