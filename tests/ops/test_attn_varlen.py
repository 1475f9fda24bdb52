"""attn_varlen against float64 attention, sequence by sequence."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cases import DTYPES, LENGTHS, normal, offsets
from filbert import attn_varlen, ops
from filbert.ops._attn_varlen import reference_attn_varlen
from filbert.ops.shared import calling
from once import once
from tolerances import assert_close_to_native, assert_exact


def qkv_views(rows: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0):
    """q, k and v as views of one ``[T, 3, H, D]`` buffer, as a fused QKV GEMM leaves them."""
    return normal(rows, 3, heads, dim, dtype=dtype, seed=seed).unbind(1)


def check(q, k, v, cu_q, cu_k, **features):
    scale = features.pop("scale", q.shape[-1] ** -0.5)
    out, lse = attn_varlen(q, k, v, cu_q, cu_k, 0, 0, scale, **features)
    native, exact = answers(q, k, v, cu_q, cu_k, scale, **features)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    # On a GPU native's float32 sums are cuBLAS's, in several chains where the kernel has one.
    factor = 3.0 if q.is_cuda and q.dtype == torch.float32 else 2.0
    assert_close_to_native(out, native[0], exact[0], factor)
    assert_close_to_native(lse, native[1], exact[1], factor, room_of_scores(q, k, scale))
    return out, lse


@once
def answers(q, k, v, cu_q, cu_k, scale, **features):
    """Output and lse in the dtype of q, and in float64."""
    wide = {n: t.double() if isinstance(t, torch.Tensor) else t for n, t in features.items()}
    exact = reference_attn_varlen(
        q.double(), k.double(), v.double(), cu_q, cu_k, 0, 0, scale, **wide
    )
    native = reference_attn_varlen(q, k, v, cu_q, cu_k, 0, 0, scale, **features)
    if q.dtype != torch.float32:
        # The reference keeps its weights in float32; PyTorch's 16-bit attention rounds them too.
        native = (native_16bit(q, k, v, cu_q, cu_k, scale, **features), native[1])
    return native, exact


def room_of_scores(q, k, scale) -> float:
    """Tensor cores align the products of a sum to the largest and cut off what then sticks out,
    where the host rounds: about 2^-21 of the sum of their magnitudes."""
    if not q.is_cuda or q.dtype == torch.float32 or not (len(q) and len(k)):
        return 0.0
    sums = torch.einsum("qhd,khd->hqk", q.double().abs(), k.double().abs())
    return 2.0**-21 * abs(scale) * float(sums.nan_to_num(0.0, 0.0).max())


def native_16bit(q, k, v, cu_q, cu_k, scale, **features):
    """The reference with softmax weights rounded to the dtype of q, as in unfused code."""
    out = torch.zeros_like(q)
    eye = torch.eye(int(k.shape[0]))
    rows = eye[:, None, :].expand(-1, q.shape[1], -1)  # V = identity reads the weights off
    weights, _ = reference_attn_varlen(
        q.float(), k.float(), rows, cu_q, cu_k, 0, 0, scale, **features
    )
    out[:] = torch.einsum("qhk,khd->qhd", weights.to(q.dtype).float(), v.float()).to(q.dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(lengths, id=name, marks=[pytest.mark.every_order] * (name == "ragged"))
        for name, lengths in LENGTHS.items()
    ],
)
def test_lengths(backend, dtype, lengths):
    q, k, v = qkv_views(sum(lengths), 2, 64, dtype)
    check(q, k, v, offsets(lengths), offsets(lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 26, 32, 40, 64, 72, 100, 128, 160, 200, 255, 256])
def test_head_dims(backend, dtype, dim):
    """One below, at and above every vector and tile; whole vectors and tails of each length."""
    lengths = [19, 40, 1]
    q, k, v = qkv_views(sum(lengths), 3, dim, dtype)
    most = ops.head_dims(torch.device("cpu" if backend == "cpu" else "cuda"))[-1]
    if dim > most:
        with pytest.raises(RuntimeError, match=f"got {dim}; need 1 to {most} on a GPU"):
            check(q, k, v, offsets(lengths), offsets(lengths))
    else:
        check(q, k, v, offsets(lengths), offsets(lengths))


AT_THE_END = """
import ctypes, mmap, sys
import torch
from filbert import _load, attn_varlen

def at_the_end(t):
    size = t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.CDLL(None, use_errno=True).mprotect(
        ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0
    )
    assert guard == 0
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - size)
    return copy.view_as(t).copy_(t)

torch.manual_seed(0)
cu = torch.tensor([0, 5, 11], dtype=torch.int32)
for isa in _load.C.isas():
    _load.C.select_isa(isa)
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (1, 2, 3, 5, 7, 8, 10, 13, 26, 31, 33, 40, 47, 100, 255):
            tensors = torch.randn(3, 11, 2, dim).to(dtype).unbind(0)
            print(isa, dtype, dim, flush=True)
            want = attn_varlen(*tensors, cu, cu, 0, 0, 0.2)
            got = attn_varlen(*map(at_the_end, tensors), cu, cu, 0, 0, 0.2)
            assert all(torch.equal(a, b) for a, b in zip(got, want))
print("done")
"""


def test_nothing_past_the_last_row_is_read():
    """Operands that end where no memory is; in a process of its own, which may die of it."""
    run = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.endswith("done\n"), f"ended with {run.returncode} after {run.stdout[-80:]}"


@pytest.mark.parametrize("slope", [None, 0.003, 0.3])
@pytest.mark.parametrize("lengths", [(16, 2000), (512, 256)], ids=str)
def test_errors_do_not_grow_with_the_number_of_keys(backend, lengths, slope):
    """Many keys of about one weight, many whose weights fall slowly, and few near a far edge."""
    q = normal(lengths[0], 2, 40)
    k, v, _ = qkv_views(lengths[1], 2, 40, torch.float32, seed=1)
    cu_q, cu_k = offsets([lengths[0]]), offsets([lengths[1]])
    slopes = None if slope is None else torch.tensor([slope, 2 * slope])
    check(q, k, v, cu_q, cu_k, alibi_slopes=slopes)
    rest = (cu_q, cu_k, 0, 0, 40**-0.5)
    exact, _ = reference_attn_varlen(
        *(t.double() for t in (q, k, v)), *rest, None if slopes is None else slopes.double()
    )
    ours, native = (
        (op(q, k, v, *rest, slopes)[0].double() - exact).abs().mean()
        for op in (attn_varlen, reference_attn_varlen)
    )
    assert ours < 1.5 * native


@pytest.mark.every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_and_key_segments_differ(backend, dtype):
    lengths_q, lengths_k = [1, 7, 0, 33, 4], [9, 3, 5, 70, 0]
    q = normal(sum(lengths_q), 2, 32, dtype=dtype)
    k, v, _ = qkv_views(sum(lengths_k), 2, 32, dtype, seed=1)
    out, lse = check(q, k, v, offsets(lengths_q), offsets(lengths_k))
    assert (out[-4:] == 0).all()  # the last sequence has queries and no keys
    assert (lse[:, -4:] == -torch.inf).all()


def test_rows_past_the_end_are_zero(backend):
    q, k, v = qkv_views(20, 2, 16, torch.float32)
    out, lse = check(q, k, v, offsets([4, 5]), offsets([4, 5]))
    assert (out[9:] == 0).all()
    assert (lse[:, 9:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(-1, 0), (3, 5), (0, 0), (-1, -1), (600, 0)], ids=str)
@pytest.mark.parametrize("alibi", [False, True], ids=["flat", "alibi"])
@pytest.mark.parametrize("biased", [False, True], ids=["nobias", "keybias"])
def test_biases_and_windows(backend, dtype, window, alibi, biased):
    lengths_q, lengths_k = [9, 30, 2], [9, 41, 600]
    q = normal(sum(lengths_q), 2, 32, dtype=dtype)
    k, v, _ = qkv_views(sum(lengths_k), 2, 32, dtype, seed=1)
    key_bias = normal(sum(lengths_k), seed=2)
    key_bias[::5] = -torch.inf
    key_bias[:9] = -torch.inf  # the first sequence sees nothing at all
    check(
        q, k, v, offsets(lengths_q), offsets(lengths_k), window=window,
        alibi_slopes=torch.tensor([0.5, 0.125]) if alibi else None,
        key_bias=key_bias if biased else None,
    )  # fmt: skip


@pytest.mark.every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [24, 128])
def test_long_texts(backend, dtype, dim):
    """More keys than fit side by side, at the widths that other tests of long texts leave out."""
    lengths = [129, 70, 200]
    q, k, v = qkv_views(sum(lengths), 1, dim, dtype)
    check(q, k, v, offsets(lengths), offsets(lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [30, 150])
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0, 1e-30])
def test_any_scale(backend, dtype, scale, length):
    q, k, v = qkv_views(length, 1, 16, dtype)
    check(q, k, v, offsets([length]), offsets([length]), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [0.0, 2.0, 30.0])
def test_scores_that_rise_along_the_text(backend, dtype, step):
    """The running maximum moves at every block of keys, at some, or hardly at all."""
    q, k, v = (t.clone() for t in qkv_views(400, 1, 32, dtype))
    q[..., 0], k[..., 0] = 1, step * torch.arange(400)[:, None] / 64
    check(q, k, v, offsets([400]), offsets([400]), scale=1.0)


def test_layouts_give_the_same_bits(backend):
    """[T, 3, H, D], [T, H, 3, D], separate tensors, odd strides: only addresses differ."""
    lengths = [5, 33, 12]
    cu = offsets(lengths)
    q, k, v = (t.contiguous() for t in qkv_views(50, 2, 24, torch.float32))
    expected = attn_varlen(q, k, v, cu, cu, 0, 0, 0.2)
    interleaved = torch.stack((q, k, v), dim=2).unbind(2)
    odd = torch.zeros(50, 2, 3 * 24 + 1)  # strides no multiple of anything
    for i, t in enumerate((q, k, v)):
        odd[..., i * 24 : (i + 1) * 24] = t
    transposed = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    strided_dim = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    for views in (interleaved, odd[..., :72].split(24, -1), transposed, strided_dim):
        for ours, want in zip(attn_varlen(*views, cu, cu, 0, 0, 0.2), expected, strict=True):
            assert_exact(ours, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row_or_head_with_odd_strides(backend, dtype):
    """Where a size is 1 its stride says nothing, and a view that counts as contiguous may begin at
    any address."""
    wide = normal(5, 1, 100, dtype=dtype)
    for view in (wide[:1, :, 4:68], wide[:, :, 4:68], normal(1, 3, 100, dtype=dtype)[:, :1, 2:66]):
        cu = offsets([view.shape[0]])
        check(view, view, view, cu, cu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [8, 9, 16])
def test_an_infinite_query_sees_only_its_own(backend, dtype, length):
    """Scores of -inf throughout give what they give with any number of keys."""
    q, k, v = (t.clone() for t in qkv_views(length, 1, 16, dtype))
    q[:], k[:] = 0, 1
    q[:, 0, 0] = -torch.inf
    out, lse = attn_varlen(q, k, v, offsets([length]), offsets([length]), 0, 0, 1.0)
    assert_exact(lse, torch.full_like(lse, -torch.inf))
    assert_exact(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(3, 3), (0, 40), (70, 0)], ids=str)
def test_windows_much_narrower_than_the_text(backend, dtype, window):
    lengths = [300, 140, 20]
    q, k, v = qkv_views(sum(lengths), 1, 32, dtype)
    slopes = torch.tensor([0.25])
    check(q, k, v, offsets(lengths), offsets(lengths), window=window)
    check(q, k, v, offsets(lengths), offsets(lengths), window=window, alibi_slopes=slopes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "poison"), [(64, float("nan")), (27, float("inf"))])
@pytest.mark.parametrize("index", range(5))
def test_neighbours_cannot_leak(backend, dtype, index, dim, poison):
    """A head of a sequence is bitwise the same alone and between sequences and heads full of NaN or
    Inf, whether its length is odd, even, or a whole number of tiles."""
    lengths = [7, 33, 12, 70, 3]
    cu = offsets(lengths)
    q, k, v = (t.clone() for t in qkv_views(sum(lengths) + 2, 3, dim, dtype))
    kept = slice(int(cu[index]), int(cu[index + 1]))
    own = offsets([lengths[index]])
    alone = attn_varlen(q[kept], k[kept], v[kept], own, own, 0, 0, 0.125)
    for t in (q, k, v):
        rest = torch.ones(t.shape[0], dtype=torch.bool)
        rest[kept] = False
        t[rest] = poison
        t[:, ::2] = poison
    out, lse = attn_varlen(q, k, v, cu, cu, 0, 0, 0.125)
    assert_exact(out[kept, 1], alone[0][:, 1])
    assert_exact(lse[1, kept], alone[1][1])


def test_own_nan_is_not_hidden(backend):
    q, k, v = (t.clone() for t in qkv_views(20, 1, 16, torch.float32))
    v[3, 0, 5] = float("nan")
    k[15, 0, 0] = float("nan")
    out, _ = attn_varlen(q, k, v, offsets([10, 10]), offsets([10, 10]), 0, 0, 0.25)
    assert out[:10, 0, 5].isnan().all()
    assert out[:10, 0, :5].isfinite().all()
    assert out[10:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(backend, dtype):
    """Scores of several thousand: the softmax is one-hot and nothing overflows."""
    q, k, v = qkv_views(50, 1, 16, dtype)
    out, lse = check(q * 60, k * 60, v, offsets([20, 30]), offsets([20, 30]), scale=1.0)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_threads_do_not_change_bits(threads):
    lengths = [300, 2, 90, 90, 17]
    q, k, v = qkv_views(sum(lengths), 3, 32, torch.float32)
    cu = offsets(lengths)
    out, _ = attn_varlen(q, k, v, cu, cu, 0, 0, 0.17)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = torch.cat(
        [
            attn_varlen(q[a:b], k[a:b], v[a:b], offsets([b - a]), offsets([b - a]), 0, 0, 0.17)[0]
            for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
        ]
    )
    torch.set_num_threads(before)
    assert_exact(out, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e6, 1e9, 1e15])
def test_huge_scores_with_any_scale(backend, dtype, size):
    """However large the scores, a row's largest keeps its weight: the scale is no power of two, so
    a maximum that was rounded differently from the score it came from would lose everything."""
    q, k, v = qkv_views(60, 3, 32, dtype)
    cu = offsets([25, 35])
    out, lse = attn_varlen(q * size, k, v, cu, cu, 0, 0, 32**-0.5)
    best = (q * size).double().transpose(0, 1) @ k.double().permute(1, 2, 0)
    seen = torch.block_diag(torch.ones(25, 25), torch.ones(35, 35)).bool()
    top = best.masked_fill(~seen, -torch.inf)
    winner = v.transpose(0, 1).gather(1, top.argmax(-1)[..., None].expand(-1, -1, 32))
    clear = top.topk(2, -1).values.diff().squeeze(-1) < -1e-3 * size  # no near tie
    assert clear.float().mean() > 0.9
    assert_exact(out.transpose(0, 1)[clear], winner[clear])
    assert (lse.double() / (top.amax(-1) * 32**-0.5) - 1).abs().max() < 1e-6


#: a call that is right, and what makes it wrong with the words that say so
GOOD = dict(
    zip("qkv", torch.zeros(3, 4, 2, 8), strict=True),
    cu_seqlens_q=offsets([4]), cu_seqlens_k=offsets([4]),
    max_seqlen_q=4, max_seqlen_k=4, scale=1.0,
)  # fmt: skip
REFUSALS = {
    "no_heads": (dict(zip("qkv", torch.zeros(3, 4, 0, 8), strict=True)), "heads; got 0"),
    "meta_bias": (dict(key_bias=torch.zeros(4, device="meta")), "got meta"),
    "dtype": (dict(q=torch.zeros(4, 2, 8, dtype=torch.float64)), "dtype of q"),
    "fp16": (dict(q=torch.zeros(4, 2, 8, dtype=torch.float16)), "float32 or bfloat16"),
    "mixed": (dict(k=torch.zeros(4, 2, 8, dtype=torch.bfloat16)), "dtype of k"),
    "rank": (dict(q=torch.zeros(4, 16)), r"got \[4, 16\]; need \[T, H, D\]"),
    "heads": (dict(k=torch.zeros(4, 3, 8)), "same heads"),
    "value_rows": (dict(v=torch.zeros(5, 2, 8)), "rows of v; got 5"),
    "head_dim": (dict(zip("qkv", torch.zeros(3, 4, 2, 0), strict=True)), "got 0; need 1 to 256"),
    "head_dim_large": (dict(zip("qkv", torch.zeros(3, 4, 2, 257), strict=True)), "1 to 256 on a C"),
    "start": (dict(cu_seqlens_q=torch.tensor([1, 4], dtype=torch.int32)), "first offset of 0"),
    "falls": (dict(cu_seqlens_k=torch.tensor([0, 3, 2], dtype=torch.int32)), "as many sequences"),
    "falls_both": (
        dict(
            cu_seqlens_q=torch.tensor([0, 3, 2], dtype=torch.int32),
            cu_seqlens_k=torch.tensor([0, 2, 4], dtype=torch.int32),
        ),
        "cu_seqlens_q; got 3 then 2 at place 2",
    ),
    "exceeds": (dict(cu_seqlens_k=torch.tensor([0, 9]).int()), "within the packed rows"),
    "int64": (dict(cu_seqlens_q=torch.tensor([0, 4])), "need int32"),
    "no_offsets": (dict(cu_seqlens_q=torch.zeros(0, dtype=torch.int32)), "leading 0"),
    "slopes": (dict(alibi_slopes=torch.zeros(3)), "alibi_slopes"),
    "slopes_dtype": (dict(alibi_slopes=torch.zeros(2, dtype=torch.float64)), "alibi_slopes"),
    "bias": (dict(key_bias=torch.zeros(3)), "key_bias"),
    "window": (dict(window=(-2, 0)), "window"),
    "device": (dict(cu_seqlens_q=torch.zeros(2, device="meta").int()), "got meta"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(change, message):
    attn_varlen(**GOOD)
    with pytest.raises(RuntimeError, match=message):
        attn_varlen(**(GOOD | change))


@pytest.mark.parametrize(
    "case",
    ["rank", "heads", "value_rows", "mixed", "start", "falls_both", "exceeds", "int64",
     "no_offsets", "slopes", "slopes_dtype", "bias", "device", "meta_bias"],
)  # fmt: skip
def test_the_fallback_refuses_too(case, monkeypatch):
    """Without the compiled library wrong offsets must not become other sequences' rows."""
    from filbert import _load

    monkeypatch.setitem(_load.missing, "ops", "taken away by a test")
    monkeypatch.setattr(
        _load, "_warned", {"filbert runs its slow reference code: taken away by a test"}
    )
    attn_varlen(**GOOD)
    with pytest.raises(RuntimeError, match=r"attn_varlen: .*; need .*; try "):
        attn_varlen(**(GOOD | REFUSALS[case][0]))


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(backend, dtype):
    q, k, v = qkv_views(12, 2, 16, dtype)
    cu = offsets([5, 0, 7])
    slopes, bias = torch.tensor([0.5, 0.25]), torch.zeros(12)
    for args in [
        (q, k, v, cu, cu, 7, 7, 0.25),
        (q, k, v, cu, cu, 7, 7, 0.25, slopes, 3, 3, bias),
        (*torch.zeros(3, 0, 2, 26, dtype=dtype), offsets([]), offsets([]), 0, 0, 1.0),
        (q[..., :10], k[..., :10], v[..., :10], cu, cu, 7, 7, 0.25),
    ]:
        torch.library.opcheck(calling.kernels().attn_varlen.default, args)


def test_compiles_once_for_any_max_seqlen():
    """max_seqlen is a SymInt: new values of it must not compile new graphs."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    q, k, v = qkv_views(12, 2, 16, torch.float32)
    cu = offsets([5, 7])
    compiled = torch.compile(
        lambda longest: attn_varlen(q, k, v, cu, cu, longest, longest, 0.25)[0],
        backend=counter, fullgraph=True, dynamic=True,
    )  # fmt: skip
    for longest in (7, 8, 9, 100):
        assert_exact(compiled(longest), attn_varlen(q, k, v, cu, cu, 7, 7, 0.25)[0])
    assert counter.frame_count == 1
