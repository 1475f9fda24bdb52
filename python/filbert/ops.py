"""One documented function per operator, and its fake (shape-only) implementation.

Every function calls ``torch.ops.filbert.<name>``, so that autograd, ``torch.compile`` and
``torch.export`` see one opaque operator. Where the compiled library is missing, the function runs
:mod:`filbert.reference` instead and says so once. Either way it raises a RuntimeError where a
gradient of an operand would be recorded, which no kernel has.

The compiled operators compare devices themselves. With one operand on the meta device the
dispatcher runs the fake implementation, whatever the others are on, so the fakes compare too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _load, reference
from .refusals import refuse_gradient, register_refusal

__all__ = [
    "attn_binary",
    "attn_tiles",
    "attn_varlen",
    "bias_gelu_",
    "gather_rows",
    "linear_binary",
    "linear_binary_bits",
    "linear_dense",
    "norm_residual",
    "norm_residual_",
    "pack_bits",
    "pack_codes",
    "pack_dense",
    "softmax_table",
    "unpack_dense",
]

_DENSE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tile_capacity(rows_q: int, sequences: int) -> int:
    """The most tiles that :func:`attn_tiles` can list; as in csrc/args/attn_tiles.h, to which the
    tests hold it."""
    return rows_q // 128 + sequences + 1


def head_dims(device: torch.device) -> range:
    """The head dimensions that the kernels of :func:`attn_varlen` have on ``device``. Smaller ones
    and those between are padded with zeros for each call. As in csrc/args/attn_varlen.h, to which
    the tests hold it."""
    return range(8, 129, 8) if device.type == "cuda" else range(1, 257)


def _kernels() -> Any:
    """The operators' namespace."""
    return torch.ops.filbert


def _one_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    """Raises unless every operand is where ``first`` is."""
    device = first.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise RuntimeError(
                f"{op}: device of {name}; got {t.device}; need {device}, as the first operand; "
                f"try {name}.to({str(device)!r})"
            )
    if not _load.have_ops():  # no Autograd kernel either
        refuse_gradient(op, [("the first operand", first), *others.items()])


def _compiled(op: str, first: Tensor) -> bool:
    """Whether the kernels run the call; otherwise the caller compares devices and runs the
    reference."""
    if "ops" in _load.missing:
        _load.warn_once(f"filbert runs its slow reference code: {_load.missing['ops']}")
        return False
    if not first.is_cpu and (why := _load.why_no_kernels(first.device)) is not None:
        raise RuntimeError(f"{op}: device; got {first.device}; {why}; try tensor.cpu()")
    return True


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
    if not _compiled("attn_varlen", q):
        _one_device(
            "attn_varlen", q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            alibi_slopes=alibi_slopes, key_bias=key_bias, tiles=tiles,
        )  # fmt: skip
        reference.check_attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, key_bias)
        return reference.attn_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
            alibi_slopes, window, key_bias,
        )  # fmt: skip
    return _kernels().attn_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
        alibi_slopes, window[0], window[1], key_bias, tiles,
    )  # fmt: skip


def _has_tiles(cu_seqlens: Tensor) -> bool:
    """Whether the kernels that would run on ``cu_seqlens`` take a work list."""
    return cu_seqlens.device.type != "cpu" and _compiled("attn_tiles", cu_seqlens)


def attn_tiles(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows_q: int, rows_k: int) -> Tensor:
    """The work list of :func:`attn_varlen` on a GPU: every sequence in tiles of up to 128 query
    rows, those with most to do first.

    It is made on the device, without the host learning any length, and depends neither on heads nor
    on dtype: make it once for all layers of a forward.

    Args:
        cu_seqlens_q: ``[B+1]`` int32 on a CUDA device, as for :func:`attn_varlen`.
        cu_seqlens_k: ``[B+1]`` int32, likewise.
        rows_q: ``q.shape[0]``.
        rows_k: ``k.shape[0]``.

    Returns:
        ``[4 + 8 * (rows_q // 128 + B + 1)]`` int32: how many tiles have one, two and four heads to
        a block, and a zero; then eight values a tile: first query row, query rows, first key row,
        keys, the key the first query stands at, sequence, and two that mean nothing. What lies
        behind the last tile is undefined.

    Raises:
        RuntimeError: offsets that are not int32 ``[B+1]`` on one CUDA device.
    """
    if not _has_tiles(cu_seqlens_q):
        _one_device("attn_tiles", cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        raise RuntimeError(
            f"attn_tiles: device; got {cu_seqlens_q.device}; need a CUDA device and filbert's CUDA "
            "kernels; try attn_varlen without tiles"
        )
    return _kernels().attn_tiles(cu_seqlens_q, cu_seqlens_k, rows_q, rows_k)


def norm_residual(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """``LayerNorm(x + bias + residual)`` in one pass over memory.

    Args:
        x: ``[T, N]`` float32 or bfloat16, on CUDA also float16; contiguous rows.
        bias: ``[N]`` in the dtype of ``x``, or None.
        residual: ``[T, N]`` in the dtype of ``x``, or None.
        weight: ``[N]``, LayerNorm's gamma, in the dtype of ``x``.
        beta: ``[N]``, LayerNorm's beta, in the dtype of ``x``.
        eps: added to the variance; take it from the model.

    Returns:
        ``[T, N]`` in the dtype of ``x``. Sums and statistics are kept in float32, the variance is
        taken in a second pass over the row (no cancellation).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Paper: ByteTransformer, arXiv 2210.03052.
    """
    if not _compiled("norm_residual", x):
        _one_device("norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta)
        return reference.norm_residual(x, bias, residual, weight, beta, eps)
    return _kernels().norm_residual(x, bias, residual, weight, beta, eps)


def norm_residual_(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """:func:`norm_residual` written over ``x``, which it returns: no allocation, and a third less
    memory traffic, since the rows written are the rows just read. Arguments and errors as there.
    """
    if not _compiled("norm_residual_", x):
        _one_device("norm_residual_", x, bias=bias, residual=residual, weight=weight, beta=beta)
        return x.copy_(reference.norm_residual(x, bias, residual, weight, beta, eps))
    _kernels().norm_residual_(x, bias, residual, weight, beta, eps)
    return x


def bias_gelu_(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``x = GELU(x + bias)``, in place.

    Args:
        x: ``[T, N]`` float32 or bfloat16, on CUDA also float16; contiguous; overwritten.
        bias: ``[N]`` in the dtype of ``x``, or None.
        approximate: ``"none"`` for the exact erf form, ``"tanh"`` for the tanh form.

    Returns:
        ``x``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an unknown ``approximate``.
    """
    if not _compiled("bias_gelu_", x):
        _one_device("bias_gelu_", x, bias=bias)
        return reference.bias_gelu_(x, bias, approximate)
    _kernels().bias_gelu_(x, bias, approximate)
    return x


def pack_dense(weight: Tensor) -> Tensor:
    """A dense weight in the layout of :func:`linear_dense`, which every instruction set shares.

    Exact: :func:`unpack_dense` gives it back bit for bit.

    Args:
        weight: ``[N, K]``, float32, float16 or bfloat16.

    Returns:
        ``[ceil(N/16), K, 16]``: panels of 16 outputs that lie side by side, with zeros for outputs
        that are not there. bfloat16 lies in pairs of inputs, ``[ceil(N/16), ceil(K/2), 16, 2]``.

    Raises:
        ValueError: no matrix of these dtypes.
    """
    if weight.ndim != 2 or weight.dtype not in _DENSE_DTYPES:
        raise ValueError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}, need [N, K] of float32, float16 or "
            "bfloat16"
        )
    return reference.pack_dense(weight)


def unpack_dense(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight ``[outputs, inputs]`` that :func:`pack_dense` was given, bit for bit.

    Args:
        packed: what :func:`pack_dense` returned.
        outputs: N.
        inputs: K.

    Raises:
        ValueError: a shape that :func:`pack_dense` does not make of such a weight.
    """
    pair = 2 if packed.dtype == torch.bfloat16 else 1
    panels = -(-outputs // reference.DENSE_PANEL)
    need = [panels, -(-inputs // pair), reference.DENSE_PANEL] + [2] * (pair == 2)
    if list(packed.shape) != need:
        raise ValueError(
            f"packed: got {tuple(packed.shape)} {packed.dtype}, need {tuple(need)} for a weight "
            f"[{outputs}, {inputs}]; try pack_dense"
        )
    return reference.unpack_dense(packed, outputs, inputs)


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
    """``act(x @ W.T + bias) + residual``, and LayerNorm of that: a dense product on a CPU.

    A row's sum has one order, whatever the other rows, their number and the threads. So a row's
    result is bitwise the same alone, in any batch and at any place of it, on one instruction set.

    Args:
        x: ``[T, K]`` rows, float32 or bfloat16; any row stride.
        weight: of :func:`pack_dense`. float32, float16 or bfloat16 with float32 rows, which 16-bit
            weights are widened to; bfloat16 with bfloat16 rows.
        outputs: N.
        bias: ``[N]`` in the dtype of ``x``.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"relu"`` or ``"silu"``.
        residual: ``[T, N]`` in the dtype of ``x``, added after the activation.
        norm_weight: ``[N]`` in the dtype of ``x``: LayerNorm follows, with ``norm_bias``.
        norm_bias: ``[N]``, with ``norm_weight``.
        eps: of the LayerNorm.

    Returns:
        ``[T, N]`` in the dtype of ``x``. Sums are float32. With bfloat16 rows and a LayerNorm the
        product is rounded to bfloat16 before the residual is added.

    Raises:
        RuntimeError: shapes, dtypes or a weight that do not fit, or CUDA tensors.

    Paper: ByteTransformer, arXiv 2210.03052 (the fused epilogues).
    """
    others = {
        "weight": weight, "bias": bias, "residual": residual, "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }  # fmt: skip
    if x.is_cuda:
        raise RuntimeError(
            f"linear_dense: device; got {x.device}; need cpu; try torch.nn.functional.linear, "
            "which is cuBLASLt there"
        )
    if not _compiled("linear_dense", x):
        _one_device("linear_dense", x, **others)
        return reference.linear_dense(
            x, weight, outputs, bias, activation, residual, norm_weight, norm_bias, eps
        )
    return _kernels().linear_dense(
        x, weight, outputs, bias, activation, residual, norm_weight, norm_bias, eps
    )


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Row ``index[t]`` of ``x`` for every ``t``, zeros where the index is no row of ``x``.

    Packing is a gather by the places of the kept tokens; unpacking is a gather by each place's
    packed row, -1 where padding was. Either way every row is written once.

    Args:
        x: ``[R, N]`` of any dtype, contiguous rows.
        index: ``[T]`` int64.

    Returns:
        ``[T, N]`` in the dtype of ``x``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    if not _compiled("gather_rows", x):
        _one_device("gather_rows", x, index=index)
        return reference.gather_rows(x, index)
    return _kernels().gather_rows(x, index)


def pack_bits(
    x: Tensor, threshold: Tensor | None = None, ties: str = "below"
) -> tuple[Tensor, Tensor]:
    """Rows of numbers to rows of bits: which elements lie above a threshold.

    Args:
        x: ``[T, K]`` float32 or bfloat16, on CUDA also float16; contiguous rows, K at most 65504.
        threshold: ``[K]`` float32, or None for 0.
        ties: what an element equal to its threshold becomes. ``"below"``: bit 0; ``"above"``:
            bit 1; ``"exact"``: two planes that hold the code 0 (below), 1 (equal) or 2 (above),
            so that ``code - 1`` is ``torch.sign``. -0.0 equals 0.0. NaN lies below everything.

    Returns:
        ``words`` int32 ``[P, T, ceil(K / 32)]``, P planes of bits: bit ``k % 32`` of word
        ``k // 32``, low bits first; bits past ``K`` are 0. ``sums`` int32 ``[T]``, the sum of a
        row's codes; with one plane, its number of ones.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, an unknown ``ties``.

    Paper: BiBERT, arXiv 2203.06390 (``threshold`` 0); BiT, arXiv 2205.13016 (one per channel).
    """
    if not _compiled("pack_bits", x):
        _one_device("pack_bits", x, threshold=threshold)
        return reference.pack_bits(x, threshold, ties)
    return _kernels().pack_bits(x, threshold, ties)


def pack_codes(
    x: Tensor, bits: int, low: int, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of numbers to bit planes of integer codes: uniform quantisation.

    The code of ``x`` is ``clamp(round(x * (1 / scale)), low, low + 2**bits - 1) - low``, rounded
    half to even in float32, and stands for ``scale * (code + low)``.

    Args:
        x: ``[T, K]`` float32 or bfloat16, on CUDA also float16; contiguous rows.
        bits: 2, 4 or 8, the number of planes.
        low: the integer that code 0 stands for: 0 for values that are never negative,
            ``-2**(bits - 1)`` for signed ones.
        scale: ``[T]`` float32; a row whose scale is 0, or so small (below 2**-128) that it has no
            reciprocal, gets the code of 0. None takes
            ``max|x| / (2**(bits - 1) - 1)`` over the finite elements of each row, so that a row's
            codes do not depend on other rows. NaN is coded as 0.

    Returns:
        ``words`` int32 ``[bits, T, ceil(K / 32)]`` and ``sums`` int32 ``[T]`` as from
        :func:`pack_bits`; plane ``p`` weighs ``2**p``. ``scale`` float32 ``[T]``, as used.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, another number of bits.

    Paper: BinaryBERT, arXiv 2012.15701.
    """
    if not _compiled("pack_codes", x):
        _one_device("pack_codes", x, scale=scale)
        return reference.pack_codes(x, bits, low, scale)
    return _kernels().pack_codes(x, bits, low, scale)


def linear_binary(
    words: Tensor,
    sums: Tensor,
    weight: Tensor,
    totals: Tensor,
    alpha: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    step: int = 2,
    low: int = -1,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A linear layer whose weights are ±1 and whose inputs are bits, by AND and popcount.

    With ``x = step * code + low`` and ``w = 2 * bit - 1``, both integers,
    ``y[t, n] = scale[t] * alpha[n] * (x[t] · w[n]) + bias[n]``. The product is exact; it is made of
    ``P = sum_p 2**p popcount(plane_p & bits)`` as ``step * (2 P - sums) + low * totals``.

    Args:
        words: int32 ``[P, T, ceil(K / 32)]`` planes of codes, from :func:`pack_bits`,
            :func:`pack_codes`, :func:`linear_binary_bits` or :func:`attn_binary`; P at most 8.
        sums: int32 ``[T]``, the sum of each row's codes.
        weight: int32 ``[ceil(N / 16), ceil(K / 32), 16]``: word ``j`` of output ``16 i + l`` at
            ``[i, j, l]``; what pads K and N is 0. See :func:`filbert.nn.weight_tiles`.
        totals: int32 ``[N]``, the sum of each output's ±1 weights, ``2 * popcount - K``.
        alpha: ``[N]`` float32.
        bias: ``[N]`` float32, or None.
        scale: ``[T]`` float32, or None for 1.
        step: 2 for ±1 inputs, 1 for other codes.
        low: the integer of code 0: -1 for ±1 and for ternary codes, 0 for {0, 1}.
        residual: ``[T, N]`` in ``dtype``, added before the norm, or None.
        norm_weight: ``[N]`` in ``dtype``, gamma of a LayerNorm over the result, or None for none.
        norm_bias: ``[N]`` in ``dtype``, its beta.
        eps: its epsilon.
        dtype: of the result: float32 or bfloat16, on CUDA also float16.

    Returns:
        ``[T, N]`` in ``dtype``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016; BinaryBERT, arXiv 2012.15701.
    """
    if not _compiled("linear_binary", words):
        _one_device(
            "linear_binary", words, sums=sums, weight=weight, totals=totals, alpha=alpha, bias=bias,
            scale=scale, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias,
        )  # fmt: skip
        return reference.linear_binary(
            words, sums, weight, totals, alpha, bias, scale, step, low, residual, norm_weight,
            norm_bias, eps,
        ).to(dtype)  # fmt: skip
    return _kernels().linear_binary(
        words, sums, weight, totals, alpha, bias, scale, step, low, residual, norm_weight,
        norm_bias, eps, str(dtype).removeprefix("torch."),
    )  # fmt: skip


def linear_binary_bits(
    words: Tensor,
    sums: Tensor,
    weight: Tensor,
    totals: Tensor,
    threshold: Tensor,
    *,
    step: int = 2,
    low: int = -1,
    until: Tensor | None = None,
    lower: Tensor | None = None,
    lower_until: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_binary` whose outputs are bits: no number of the product is ever stored.

    With ``lower`` or ``lower_until`` the outputs are codes 0, 1 and 2, how many of two bits are 1.
    An activation that falls and then rises, and whose 0 is a value of its own (GELU before
    ``torch.sign``), is so one product.

    Args:
        words: as for :func:`linear_binary`.
        sums: likewise.
        weight: likewise.
        totals: likewise.
        threshold: ``[N]`` int32. Output ``n`` is 1 where ``x[t] · w[n] >= threshold[n]``; the
            smallest int32 makes it always 1, the largest always 0.
        step: as for :func:`linear_binary`.
        low: likewise.
        until: ``[N]`` int32, or None: the output is also 1 where ``x[t] · w[n] < until[n]``.
        lower: ``[N]`` int32, or None: ``threshold`` of the second bit; the first one's if None.
        lower_until: ``[N]`` int32, or None: ``until`` of the second bit.

    Returns:
        ``words`` int32 ``[P, T, ceil(N / 32)]``, one plane or, with a second bit, two, and ``sums``
        int32 ``[T]``, the next layer's input.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.

    Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016.
    """
    if not _compiled("linear_binary_bits", words):
        _one_device(
            "linear_binary_bits", words, sums=sums, weight=weight, totals=totals,
            threshold=threshold, until=until, lower=lower, lower_until=lower_until,
        )  # fmt: skip
        return reference.linear_binary_bits(
            words, sums, weight, totals, threshold, step, low, until, lower, lower_until
        )
    return _kernels().linear_binary_bits(
        words, sums, weight, totals, threshold, step, low, until, lower, lower_until
    )


def attn_binary(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: int,
    head_dim: int,
    *,
    threshold: Tensor | None = None,
    ties: str = "below",
    score_ties: str = "below",
    table: Tensor | None = None,
    half: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences in which queries, keys, values and weights are bits.

    With ``q``, ``k`` and ``v`` of ±1, the score of a query and a key is ``S = q · k``, an integer.
    A key is chosen or not, and the context is the sum of the chosen values, again an integer, of
    which bits are made at once.

    - Without ``table`` it is BiBERT's Boolean attention: keys with ``S > 0`` are chosen.
    - With ``table`` it is BiT's thresholded softmax: ``p = softmax(c S)`` is chosen where it rounds
      up, ``p > half``. A score is one of ``D + 1`` values, so ``table[j]`` holds the weight
      ``exp(-2 c j)`` of a key that misses the row's best score by ``2 j``, as an integer.

    Sequence ``s`` is the rows ``cu_seqlens[s]:cu_seqlens[s + 1]`` and sees no other rows.

    Args:
        q: int32 ``[T, H * D / 32]`` bits, a one being +1; any row stride, contiguous words.
        k: likewise.
        v: likewise.
        cu_seqlens: int32 ``[B + 1]``; starts at 0, never falls, ends at most at ``T``. Rows past
            its end are no sequence's: their bits and sums are 0. On CUDA wrong offsets are clamped
            and give wrong results.
        max_seqlen: length of the longest sequence; a hint, results never depend on it.
        heads: H.
        head_dim: D, a multiple of 32 up to 128.
        threshold: ``[H * D]`` int32 that the context is compared with, or None for 0.
        ties: what a context equal to its threshold becomes, as for :func:`pack_bits`.
        score_ties: ``"below"`` does not choose a key with ``S = 0``, ``"above"`` does. It has no
            meaning with ``table``.
        table: int64 ``[D + 1]``, not rising, from 0 to 2**40, see :func:`softmax_table`.
        half: half of the quantiser's step: keys with ``table[j] > half * sum(table)`` are chosen,
            compared in float64.

    Returns:
        ``words`` int32 ``[P, T, H * D / 32]``, one plane or, with ``ties="exact"``, two, and
        ``sums`` int32 ``[T]``, both as from :func:`pack_bits`.

    Raises:
        RuntimeError: shapes, dtypes, devices or ``cu_seqlens`` that do not fit.

    Paper: BiBERT, arXiv 2203.06390; BiT, arXiv 2205.13016.
    """
    if not _compiled("attn_binary", q):
        _one_device(
            "attn_binary", q, k=k, v=v, cu_seqlens=cu_seqlens, threshold=threshold, table=table
        )
        return reference.attn_binary(
            q, k, v, cu_seqlens, heads, head_dim, threshold, ties, score_ties, table, half
        )
    return _kernels().attn_binary(
        q, k, v, cu_seqlens, max_seqlen, heads, head_dim, threshold, ties, score_ties, table, half
    )


def softmax_table(scale: float, head_dim: int, device: torch.device | None = None) -> Tensor:
    """The ``table`` of :func:`attn_binary` for ``softmax(scale * S)``.

    Returns:
        int64 ``[head_dim + 1]``: ``round(2**40 * exp(-2 * scale * j))``. Integers, so that the sum
        of a row is exact and its order does not matter.

    Raises:
        ValueError: a scale that is not finite and positive.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(
            f"softmax_table: scale; got {scale}; need a finite positive number; try the product of "
            "the scales of q and k divided by sqrt(head_dim)"
        )
    misses = torch.arange(head_dim + 1, dtype=torch.float64, device=device)
    return (2.0**40 * (-2 * misses * scale).exp()).round().to(torch.int64)


def _fake_attn_varlen(
    q, k, v, cu_q, cu_k, max_q, max_k, scale, slopes=None, left=-1, right=-1, key_bias=None,
    tiles=None,
):  # fmt: skip
    _one_device(
        "attn_varlen", q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        alibi_slopes=slopes, key_bias=key_bias, tiles=tiles,
    )  # fmt: skip
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _fake_attn_tiles(cu_q, cu_k, rows_q, rows_k):
    _one_device("attn_tiles", cu_q, cu_seqlens_k=cu_k)
    return cu_q.new_empty(4 + 8 * tile_capacity(rows_q, cu_q.shape[0] - 1))


def _fake_norm_residual(x, bias, residual, weight, beta, eps):
    _one_device("norm_residual", x, bias=bias, residual=residual, weight=weight, beta=beta)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_norm_residual_(x, bias, residual, weight, beta, eps):
    _one_device("norm_residual_", x, bias=bias, residual=residual, weight=weight, beta=beta)


def _fake_bias_gelu_(x, bias=None, approximate="none"):
    _one_device("bias_gelu_", x, bias=bias)


def _fake_linear_dense(
    x, weight, outputs, bias=None, activation="none", residual=None, norm_weight=None,
    norm_bias=None, eps=0.0,
):  # fmt: skip
    _one_device(
        "linear_dense", x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip
    return x.new_empty((x.shape[0], outputs))


def _fake_gather_rows(x, index):
    _one_device("gather_rows", x, index=index)
    return x.new_empty((index.shape[0], x.shape[1]))


def _planes_of(like: Tensor, planes: int, rows: int, features: int) -> tuple[Tensor, Tensor]:
    words = like.new_empty((planes, rows, (features + 31) // 32), dtype=torch.int32)
    return words, like.new_empty((rows,), dtype=torch.int32)


def _fake_pack_bits(x, threshold=None, ties="below"):
    _one_device("pack_bits", x, threshold=threshold)
    return _planes_of(x, 2 if ties == "exact" else 1, *x.shape)


def _fake_pack_codes(x, bits, low, scale=None):
    _one_device("pack_codes", x, scale=scale)
    return *_planes_of(x, bits, *x.shape), x.new_empty((x.shape[0],), dtype=torch.float32)


def _fake_linear_binary(
    words, sums, weight, totals, alpha, bias=None, scale=None, step=2, low=-1, residual=None,
    norm_weight=None, norm_bias=None, eps=0.0, dtype="float32",
):  # fmt: skip
    _one_device(
        "linear_binary", words, sums=sums, weight=weight, totals=totals, alpha=alpha, bias=bias,
        scale=scale, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    return words.new_empty((words.shape[1], alpha.shape[0]), dtype=getattr(torch, dtype))


def _fake_linear_binary_bits(
    words, sums, weight, totals, threshold, step=2, low=-1, until=None, lower=None,
    lower_until=None,
):  # fmt: skip
    _one_device(
        "linear_binary_bits", words, sums=sums, weight=weight, totals=totals, threshold=threshold,
        until=until, lower=lower, lower_until=lower_until,
    )  # fmt: skip
    planes = 1 if lower is None and lower_until is None else 2
    return _planes_of(words, planes, words.shape[1], threshold.shape[0])


def _fake_attn_binary(
    q, k, v, cu_seqlens, max_seqlen, heads, head_dim, threshold=None, ties="below",
    score_ties="below", table=None, half=0.0,
):  # fmt: skip
    _one_device("attn_binary", q, k=k, v=v, cu_seqlens=cu_seqlens, threshold=threshold, table=table)
    return _planes_of(q, 2 if ties == "exact" else 1, q.shape[0], heads * head_dim)


#: the shape-only implementation of every operator
FAKES: dict[str, Callable[..., Any]] = {
    "attn_binary": _fake_attn_binary,
    "attn_tiles": _fake_attn_tiles,
    "attn_varlen": _fake_attn_varlen,
    "bias_gelu_": _fake_bias_gelu_,
    "gather_rows": _fake_gather_rows,
    "linear_binary": _fake_linear_binary,
    "linear_binary_bits": _fake_linear_binary_bits,
    "linear_dense": _fake_linear_dense,
    "norm_residual": _fake_norm_residual,
    "norm_residual_": _fake_norm_residual_,
    "pack_bits": _fake_pack_bits,
    "pack_codes": _fake_pack_codes,
}


def register(namespace: str) -> None:
    """Gives the operators of a loaded library what Python holds of them: the fakes, and the refusal
    of gradients."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    register_refusal(namespace, FAKES)


if _load.have_ops():
    register("filbert")
