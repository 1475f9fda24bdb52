"""The meaning of every operator, in a few lines of eager PyTorch.

These functions are the oracle of the tests (fed with float64 they are the exact answer) and the
last resort when the compiled library cannot be loaded. They are written to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

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


#: outputs that lie side by side in a packed dense weight
DENSE_PANEL = 16
#: activations of linear_dense
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def pack_dense(weight: Tensor) -> Tensor:
    """See :func:`filbert.ops.pack_dense`."""
    outputs, inputs = weight.shape
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    missing = (0, -inputs % pair, 0, -outputs % DENSE_PANEL)
    whole = torch.nn.functional.pad(weight.detach(), missing)
    count, steps = whole.shape[0] // DENSE_PANEL, whole.shape[1] // pair
    panels = whole.view(count, DENSE_PANEL, steps, pair).transpose(1, 2)
    return (panels if pair == 2 else panels.squeeze(-1)).contiguous()


def unpack_dense(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """See :func:`filbert.ops.unpack_dense`."""
    panels = packed if packed.ndim == 4 else packed.unsqueeze(-1)
    count, steps, side, pair = panels.shape
    whole = panels.transpose(1, 2).reshape(count * side, steps * pair)
    own = whole.shape == (outputs, inputs)  # else a view of more than is there
    return (
        whole.contiguous()
        if own
        else whole[:outputs, :inputs].clone(memory_format=torch.contiguous_format)
    )


def linear_dense(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Meaning of :func:`filbert.ops.linear_dense`: sums in float32, or wider, and one rounding."""
    wide = _wide(x.dtype)
    y = x.to(wide) @ unpack_dense(weight, outputs, x.shape[1]).to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.to(wide)
    if norm_weight is None or norm_bias is None:
        return y.to(x.dtype)
    return norm_residual(y, None, None, norm_weight, norm_bias, eps).to(x.dtype)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Meaning of :func:`filbert.ops.gather_rows`: row ``index[t]`` of x, or zeros."""
    valid = (index >= 0) & (index < x.shape[0])
    out = x.new_zeros((index.shape[0], x.shape[1]))
    out[valid] = x[index[valid]]
    return out


# Binary operators. A row of codes is held as bit planes: bit p of code k is bit k % 32 of word
# k // 32 in plane p, low bits first. Everything about them is integer arithmetic, hence exact.


def words_for(features: int) -> int:
    """How many 32-bit words a plane of ``features`` bits takes."""
    return (features + 31) // 32


def bits_to_words(bits: Tensor) -> Tensor:
    """``[..., K]`` of 0 and 1 to int32 ``[..., ceil(K / 32)]``, padded with zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.int64), (0, -bits.shape[-1] % 32))
    groups = padded.unflatten(-1, (-1, 32)) << torch.arange(32, device=bits.device)
    words = groups.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def words_to_bits(words: Tensor, features: int) -> Tensor:
    """The inverse of :func:`bits_to_words`: int64 ``[..., features]`` of 0 and 1."""
    bits = words.to(torch.int64).unsqueeze(-1) >> torch.arange(32, device=words.device) & 1
    return bits.flatten(-2)[..., :features]


def codes_to_words(codes: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    """Codes ``[T, K]`` to their planes ``[planes, T, ceil(K / 32)]`` and row sums ``[T]``."""
    words = torch.stack([bits_to_words(codes >> p & 1) for p in range(planes)])
    return words, codes.sum(-1).to(torch.int32)


def words_to_codes(words: Tensor, features: int) -> Tensor:
    """The inverse: int64 codes ``[T, features]``."""
    weights = 1 << torch.arange(words.shape[0], device=words.device)
    return (words_to_bits(words, features) * weights[:, None, None]).sum(0)


def _compare(x: Tensor, threshold: Tensor | float | int, ties: str) -> tuple[Tensor, Tensor]:
    """Codes of ``x`` against ``threshold``: the planes and sums of what ``ties`` asks for."""
    above, below = x > threshold, x >= threshold
    codes = {"below": above.long(), "above": below.long(), "exact": above.long() + below.long()}
    return codes_to_words(codes[ties], 2 if ties == "exact" else 1)


def pack_bits(
    x: Tensor, threshold: Tensor | None = None, ties: str = "below"
) -> tuple[Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.pack_bits`."""
    wide = x.to(_wide(x.dtype))
    return _compare(wide, 0.0 if threshold is None else threshold.to(wide.dtype), ties)


def pack_codes(
    x: Tensor, bits: int, low: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Meaning of :func:`filbert.ops.pack_codes`."""
    wide = x.to(_wide(x.dtype))
    if scale is None:
        largest = torch.nn.functional.pad(wide.nan_to_num(0.0, 0.0, 0.0).abs(), (0, 1)).amax(-1)
        # By a tensor: a GPU multiplies by the rounded reciprocal of a Python number instead.
        scale = largest / torch.full_like(largest, 2 ** (bits - 1) - 1)
    # A multiplication by the reciprocal, as the kernels do it, so that both round alike.
    inverse = torch.where((1 / scale).isfinite(), 1 / scale, 0.0).to(wide.dtype)
    levels = (wide * inverse[:, None]).nan_to_num(0.0, 2.0**30, -(2.0**30)).round()
    codes = (levels.clamp(low, low + 2**bits - 1) - low).long()
    return *codes_to_words(codes, bits), scale.to(torch.float32).expand(x.shape[0]).contiguous()


def weight_to_tiles(bits: Tensor) -> Tensor:
    """Weight bits ``[N, K]`` to int32 ``[ceil(N/16), ceil(K/32), 16]``: see docs/binary.md."""
    words = bits_to_words(bits)
    words = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[0] % 16))
    return words.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def tiles_to_weight(tiles: Tensor, out_features: int, features: int) -> Tensor:
    """The inverse: int64 ``[N, K]`` of 0 and 1."""
    return words_to_bits(tiles.transpose(1, 2).flatten(0, 1), features)[:out_features]


def binary_product(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, step: int, low: int
) -> Tensor:
    """int64 ``[T, N]``: ``sum_k (step * code + low)[t, k] * (2 * bit - 1)[n, k]``."""
    features = 32 * words.shape[2]  # what pads the rows and the weight is zero in both
    codes = words_to_codes(words, features).double()
    counts = codes @ tiles_to_weight(weight, totals.shape[0], features).double().T
    return step * (2 * counts.long() - sums[:, None]) + low * totals.long()


def linear_binary(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, alpha: Tensor,
    bias: Tensor | None = None, scale: Tensor | None = None, step: int = 2, low: int = -1,
    residual: Tensor | None = None, norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """Meaning of :func:`filbert.ops.linear_binary`."""
    wide = _wide(alpha.dtype)
    y = binary_product(words, sums, weight, totals, step, low).to(wide) * alpha
    if scale is not None:
        y = y * scale[:, None].to(wide)
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    if norm_weight is not None:
        assert norm_bias is not None
        y = norm_residual(y, None, None, norm_weight, norm_bias, eps)
    return y


def linear_binary_bits(
    words: Tensor, sums: Tensor, weight: Tensor, totals: Tensor, threshold: Tensor,
    step: int = 2, low: int = -1, until: Tensor | None = None, lower: Tensor | None = None,
    lower_until: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Meaning of :func:`filbert.ops.linear_binary_bits`."""
    dots = binary_product(words, sums, weight, totals, step, low)

    def bit(start: Tensor, end: Tensor | None) -> Tensor:
        return (dots >= start) if end is None else (dots >= start) | (dots < end)

    codes = bit(threshold, until).long()
    if lower is None and lower_until is None:
        return codes_to_words(codes, 1)
    codes = codes + bit(threshold if lower is None else lower, lower_until).long()
    return codes_to_words(codes, 2)


def attn_binary(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, heads: int, head_dim: int,
    threshold: Tensor | None = None, ties: str = "below", score_ties: str = "below",
    table: Tensor | None = None, half: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Meaning of :func:`filbert.ops.attn_binary`: one sequence and head after the other."""
    hidden = heads * head_dim
    counts = torch.zeros(q.shape[0], heads, head_dim, dtype=torch.int64, device=q.device)
    ends = cu_seqlens.tolist()
    signs = [
        2 * words_to_bits(t, hidden).unflatten(1, (heads, head_dim)).double() - 1 for t in (q, k, v)
    ]
    for begin, end in pairwise(ends):
        if begin == end:
            continue
        qs, ks, vs = (t[begin:end].transpose(0, 1) for t in signs)
        scores = (qs @ ks.transpose(1, 2)).long()  # [H, L, L], from -D to D in steps of two
        if table is None:
            chosen = scores >= 0 if score_ties == "above" else scores > 0
        else:
            below_best = (scores.amax(-1, keepdim=True) - scores) // 2
            weights = table[below_best]  # [H, L, L] int64
            chosen = weights.double() > half * weights.sum(-1, keepdim=True).double()
        counts[begin:end] = (chosen.double() @ vs).long().transpose(0, 1)
    words, sums = _compare(counts.flatten(1), 0 if threshold is None else threshold, ties)
    words[:, ends[-1] :] = 0
    sums[ends[-1] :] = 0
    return words, sums
