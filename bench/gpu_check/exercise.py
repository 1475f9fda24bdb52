"""Every kernel on a handful of ragged shapes: what shows that a library works, and what the
sanitizers watch.

Inputs are made and answers are computed on the CPU, so that on the GPU little runs but filbert.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from filbert.ops._attn_binary import reference_attn_binary
from filbert.ops._attn_varlen import reference_attn_varlen
from filbert.ops._embedding_grouped import reference_embedding_grouped
from filbert.ops._linear_binary import reference_linear_binary, reference_linear_binary_bits
from filbert.ops._linear_grouped import reference_linear_grouped
from filbert.ops._pack_bits import reference_pack_bits, reference_pack_codes
from filbert.ops._quantize_rows import reference_quantize_rows
from filbert.ops.shared.words import bits_to_words, weight_to_tiles

from ..check import row_error
from ..runner import DTYPES, dtypes_on

#: far above rounding and far below any mistake; the tests are the ones that are strict
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
LENGTHS = ([5, 0, 1, 130, 17, 64, 3], [16, 32, 48, 20], [300, 2])
WIDTHS = ((9, 384), (5, 33), (2, 1031))
#: the end of the last line where not everything ran
UNFINISHED = "stopped at its time limit"
#: name of a call, the error of its result, the error it may have
Outcome = tuple[str, float, float]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def attention(device: str, dtype: str, dims: tuple[int, ...], features: bool) -> Iterator[Outcome]:
    """Packed attention: views of one buffer, tensors of their own, biases and a window."""
    from filbert import attn_tiles, attn_varlen

    for lengths in LENGTHS:
        total, cu = sum(lengths), offsets(lengths)
        there = cu.to(device)
        tiles = attn_tiles(there, there, total, total) if device != "cpu" else None
        slopes, bias, window = None, None, (-1, -1)
        if features:
            slopes, window = torch.tensor([0.5, 0.25, 0.125]), (40, 9)
            bias = normal(total, dtype=torch.float32, seed=1)
        moved = [None if t is None else t.to(device) for t in (slopes, bias)]
        for dim in dims:
            qkv = normal(total, 3, 3, dim, dtype=DTYPES[dtype])
            q, k, v = qkv.double().unbind(1)
            right, _ = reference_attn_varlen(q, k, v, cu, cu, 0, 0, dim**-0.5, slopes, window, bias)
            views = qkv.to(device).unbind(1)
            apart = [t.contiguous() for t in views]
            for (q, k, v), made in ((views, None), (apart, tiles)):
                out, _ = attn_varlen(
                    q, k, v, there, there, 0, 0, dim**-0.5, moved[0], window, moved[1], made
                )
                name = f"attn_varlen {dtype} D={dim} {lengths}"
                yield name, row_error(out.cpu(), right), TOLERANCE[dtype]


def rows(device: str, dtype: str) -> Iterator[Outcome]:
    """The row kernels, in place and not, with and without their optional operands."""
    from filbert import bias_gelu_, gather_rows, norm_residual, norm_residual_

    kind, limit = DTYPES[dtype], TOLERANCE[dtype]
    for shape in WIDTHS:
        x, residual = (normal(*shape, dtype=kind, seed=s) for s in (0, 1))
        bias, weight, beta = normal(3, shape[1], dtype=kind, seed=2)
        own_x, own_bias, own_residual, own_weight, own_beta = (
            t.clone().to(device) for t in (x, bias, residual, weight, beta)
        )
        affine = (own_weight, own_beta, 1e-5)
        width = (shape[1],)
        total = x.double() + bias.double() + residual.double()
        right = F.layer_norm(total, width, weight.double(), beta.double(), 1e-5)
        out = norm_residual(own_x, own_bias, own_residual, *affine)
        yield f"norm_residual {dtype} {shape}", row_error(out.cpu(), right), limit
        norm_residual_(own_x, own_bias, own_residual, *affine)
        yield f"norm_residual_ {dtype} {shape}", row_error(own_x.cpu(), right), limit
        plain = norm_residual(x.to(device), None, None, *affine)
        right = F.layer_norm(x.double(), width, weight.double(), beta.double(), 1e-5)
        yield f"norm_residual {dtype} {shape} alone", row_error(plain.cpu(), right), limit
        for form in ("none", "tanh"):
            out = bias_gelu_(x.clone().to(device), own_bias, form)
            right = F.gelu(x.double() + bias.double(), approximate=form)
            yield f"bias_gelu_ {dtype} {shape} {form}", row_error(out.cpu(), right), limit
        index = torch.tensor([shape[0] - 1, -1, 0, shape[0], 1])
        right = x[index.clamp(0, shape[0] - 1)]
        right[[1, 3]] = 0
        out = gather_rows(x.to(device), index.to(device))
        yield f"gather_rows {dtype} {shape}", row_error(out.cpu(), right), 0.0


def same(name: str, got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Outcome:
    """Of what is integers, and equal or wrong."""
    wrong = sum(int((a.cpu() != b).sum()) for a, b in zip(got, right, strict=True))
    return name, float(wrong), 0.0


def bits(device: str) -> Iterator[Outcome]:
    """The linear layers of bits and what packs their rows."""
    from filbert import ops

    for rows, features, outputs in ((5, 100, 33), (130, 768, 768), (1, 3072, 80), *large(device)):
        x = normal(rows, features, dtype=torch.float32)
        packed = reference_pack_bits(x, None, "exact")
        name = f"[{rows}, {features}]"
        yield same(f"pack_bits {name}", ops.pack_bits(x.to(device), None, "exact"), packed)
        codes = reference_pack_codes(x, 8, -128)
        yield same(f"pack_codes {name}", ops.pack_codes(x.to(device), 8, -128), codes)
        weight = normal(outputs, features, dtype=torch.float32, seed=1) > 0
        tiles, totals = weight_to_tiles(weight), 2 * weight.sum(1).int() - features
        threshold = torch.arange(outputs, dtype=torch.int32) - outputs // 2
        there = [t.to(device) for t in (tiles, totals, threshold)]
        for planes, step, low in ((reference_pack_bits(x), 2, -1), (codes[:2], 1, -128)):
            own = [t.to(device) for t in planes]
            right = reference_linear_binary_bits(*planes, tiles, totals, threshold, step, low)
            got = ops.linear_binary_bits(*own, *there, step=step, low=low)
            yield same(f"linear_binary_bits {name} to {outputs}, {len(planes[0])}", got, right)
            edges = [threshold - shift for shift in (9, 1, 5)]
            right = reference_linear_binary_bits(
                *planes, tiles, totals, threshold, step, low, *edges
            )
            until, lower, lower_until = (t.to(device) for t in edges)
            got = ops.linear_binary_bits(
                *own, *there, step=step, low=low, until=until, lower=lower, lower_until=lower_until
            )
            yield same(f"linear_binary_bits to codes, {name} to {outputs}", got, right)
            ones = torch.ones(outputs)
            right = (reference_linear_binary(*planes, tiles, totals, ones, None, None, step, low),)
            got = ops.linear_binary(*own, *there[:2], ones.to(device), step=step, low=low)
            yield same(f"linear_binary {name} to {outputs}, {len(planes[0])}", (got,), right)


def bit_attention(device: str) -> Iterator[Outcome]:
    """Attention of bits, Boolean and by a table."""
    from filbert import ops

    for lengths in LENGTHS:
        cu, total = offsets(lengths), sum(lengths)
        for dim in (32, 64, 128):
            signs = [normal(total, 2 * dim, dtype=torch.float32, seed=s) > 0 for s in range(3)]
            q, k, v = (bits_to_words(t) for t in signs)
            for table, half in ((None, 0.0), (ops.softmax_table(0.1, dim), 0.02)):
                right = reference_attn_binary(
                    q, k, v, cu, 2, dim, None, "exact", "below", table, half
                )
                got = ops.attn_binary(
                    *(t.to(device) for t in (q, k, v, cu)), max(lengths), 2, dim, ties="exact",
                    table=None if table is None else table.to(device), half=half,
                )  # fmt: skip
                yield same(f"attn_binary D={dim} {lengths}", got, right)


def few_bits(device: str) -> Iterator[Outcome]:
    """Rows of 8-bit codes, and the layers and tables of few bits."""
    from filbert import ops

    for bits in (4, 8):
        table = ops.pack_table(normal(50, 390, dtype=torch.float32), bits)
        ids = torch.arange(33) % 50
        right = reference_embedding_grouped(ids, *table, 390)
        got = ops.embedding_grouped(ids.to(device), *(t.to(device) for t in table), 390)
        yield same(f"embedding_grouped {bits} bits", (got,), (right,))
    for rows, features, outputs in ((5, 128, 40), (40, 768, 80), (300, 256, 130), *large(device)):
        features -= features % 128
        x = normal(rows, features, dtype=torch.float32)
        codes = reference_quantize_rows(x)
        yield same(f"quantize_rows [{rows}, {features}]", ops.quantize_rows(x.to(device)), codes)
        gamma, beta = normal(features, dtype=torch.float32, seed=4), torch.zeros(features)
        total, made, scale, zeros = ops.norm_residual_codes(
            x.to(device), None, None, gamma.to(device), beta.to(device), 1e-5
        )
        # Its own numbers, which another order of sums may have rounded otherwise.
        right = reference_quantize_rows(total.cpu())
        yield same(f"norm_residual_codes [{rows}, {features}]", (made, scale, zeros), right)
        own = dict(zip(("x", "x_scale", "x_zero"), codes, strict=True))
        there = {name: t.to(device) for name, t in own.items()}
        for bits in (2, 3, 4, 6, 8):
            generator = torch.Generator().manual_seed(bits)
            plain = torch.randint(0, 1 << bits, (outputs, features), generator=generator)
            plain = plain.to(torch.uint8)
            for groups in (1, features // 64):
                shape = (outputs, groups)
                numbers = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
                multiplier = torch.randint(1, 9, shape, generator=generator).to(torch.uint8)
                factor = multiplier if groups > 1 else None
                for zero in (None, numbers):
                    given = {
                        "weight": ops.pack_grouped(plain, bits),
                        "scale": torch.full((outputs,), 2.0**-9),
                        "totals": ops.grouped_totals(plain, bits, factor, zero),
                        "multiplier": None if factor is None else ops.pack_groups(factor),
                        "offset": None if zero is None else ops.grouped_offsets(zero, bits, factor),
                    }
                    moved = {n: None if t is None else t.to(device) for n, t in given.items()}
                    name = f"{bits} bits {groups} groups [{rows}, {features}] to {outputs}"
                    right = reference_linear_grouped(**own, **given, bits=bits)
                    got = ops.linear_grouped(**there, **moved, bits=bits)
                    yield same(f"linear_grouped {name}", (got,), (right,))
            got = ops.linear_grouped(x.to(device), **moved, bits=bits)
            yield same(f"linear_grouped of numbers, {name}", (got,), (right,))
            _, made, scale, zeros = ops.linear_grouped_codes(**there, **moved, bits=bits)
            right = reference_quantize_rows(right)
            yield same(f"linear_grouped_codes {name}", (made, scale, zeros), right)


def low_rank(device: str, dtype: str) -> Iterator[Outcome]:
    """The feed-forward part of low rank: few rows, which blocks share, and many."""
    from filbert import ops

    kind = DTYPES[dtype]
    # float16 on the CPU is the kernel for GPUs, run by the host.
    pack = ops.pack_dense if device == "cpu" and dtype != "float16" else ops.pad_factor
    for rows, rank, inner, other in ((3, 40, 1032, 17), (130, 200, 136, 256), (12300, 5, 72, 130)):
        x = normal(rows, 72, dtype=kind)
        shapes = ((rank, 72), (inner, rank), (other, inner), (48, other))
        factors = [
            (normal(*s, dtype=torch.float32, seed=i) * s[1] ** -0.5).to(kind)
            for i, s in enumerate(shapes)
        ]
        bias, last = normal(inner, dtype=kind, seed=5), normal(48, dtype=kind, seed=6)
        a, b, c, d = (f.double() for f in factors)
        right = F.gelu(x.double() @ a.T @ b.T + bias.double()) @ c.T @ d.T + last.double()
        pa, pb, pc, pd = (pack(f).to(device) for f in factors)
        got = ops.ffn_lowrank(
            x.to(device), pa, pb, bias.to(device), pc, pd, last.to(device), rank, inner, other, 48
        )
        name = f"ffn_lowrank {dtype} {rows} rows, ranks {rank} and {other}"
        yield name, row_error(got.cpu(), right), TOLERANCE[dtype]
        right = x.double() @ a.double().T @ b.double().T + bias.double()
        got = ops.linear_lowrank(x.to(device), pa, pb, rank, inner, bias.to(device))
        name = f"linear_lowrank {dtype} {rows} rows, rank {rank}"
        yield name, row_error(got.cpu(), right), TOLERANCE[dtype]


def large(device: str) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of a binary layer with more large tiles than multiprocessors: a GPU
    makes small tiles of any smaller one. In five columns of tiles, and two stages of inputs."""
    if device == "cpu":
        return []
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return [(128 * (1 + count // 5) + 4, 1100, 520)]


def in_turn(calls: Iterable[Iterator[Outcome]]) -> Iterator[Outcome]:
    """One of each, then the next of each: who stops early has seen something of every kernel."""
    left = list(calls)
    while left:
        for one in list(left):
            try:
                yield next(one)
            except StopIteration:
                left.remove(one)


def outcomes(device: str, quick: bool) -> Iterator[Outcome]:
    """All calls, or with ``quick`` one attention."""
    if quick:
        yield from attention(device, "float16" if device != "cpu" else "float32", (64,), False)
        return
    calls = [bits(device), bit_attention(device), few_bits(device)]
    for dtype in dtypes_on(device):
        calls += [attention(device, dtype, (dim,), False) for dim in (32, 64, 128, 40)]
        calls += [attention(device, dtype, (64,), True), rows(device, dtype)]
        if device == "cpu" or dtype != "float32":
            calls.append(low_rank(device, dtype))
    yield from in_turn(calls)


def missing(device: str) -> str | None:
    """Why filbert's kernels cannot run on that device, or None if they can."""
    from filbert import _load

    reason = _load.missing.get("ops") or (_load.missing.get("cuda") if device != "cpu" else None)
    if reason:
        return reason
    key = "CPU" if device == "cpu" else "CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("filbert::attn_varlen", key):
        return f"the libraries are loaded, but attn_varlen has no kernel for {key}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="runs every kernel on small ragged shapes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="one attention only")
    parser.add_argument("--limit-s", type=float, help="begin no call after that many seconds")
    given = parser.parse_args()
    if (why := missing(given.device)) is not None:
        print(why)
        return 1
    count, bad, unfinished = 0, [], ""
    end = time.monotonic() + (given.limit_s or float("inf"))
    for name, error, limit in outcomes(given.device, given.quick):
        count += 1
        if not error <= limit:  # a NaN is wrong too
            bad.append(f"{name}: error {error:.2g}, allowed {limit:.0e}")
        if time.monotonic() > end:
            unfinished = f", {UNFINISHED}"
            break
    for line in bad:
        print(line)
    built = ""
    if given.device != "cpu":
        built = f", built for {torch.ops.filbert.cuda_architectures()}"
    print(f"{count} calls, {len(bad)} wrong{built}{unfinished}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
