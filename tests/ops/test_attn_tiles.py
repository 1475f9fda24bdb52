"""The work list of attn_varlen on a GPU, and that launches do not depend on lengths."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cases import LENGTHS, normal, offsets
from conftest import BACKENDS
from filbert import attn_tiles, attn_varlen
from filbert.ops._attn_tiles import tile_capacity
from tolerances import assert_exact

#: the backends that have a work list
pytestmark = pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if not b.startswith("cpu")], indirect=True
)
TILE_ROWS = 128


def heads_per_block(rows: int, keys: int) -> int:
    """The rule, told again: how many heads fit side by side in one block."""
    if rows <= 16 and keys <= 32:
        return 4
    return 2 if rows <= 32 and keys <= 64 else 1


def expected_tiles(lengths_q, lengths_k, rows_q):
    """The six values of every tile."""
    tiles, q_begin, k_begin = [], 0, 0
    segments = [*zip(lengths_q, lengths_k, strict=True), (rows_q - sum(lengths_q), 0)]
    for sequence, (rows, keys) in enumerate(segments):
        for first in range(0, rows, TILE_ROWS):
            k_row = k_begin if sequence < len(lengths_q) else 0
            size, place = min(TILE_ROWS, rows - first), first + keys - rows
            tiles.append((q_begin + first, size, k_row, keys, place, sequence))
        q_begin, k_begin = q_begin + rows, k_begin + keys
    return tiles


def listed(tiles):
    """The six values of every tile on the list, and how many heads its block takes."""
    values = tiles.tolist()
    ones, twos, fours, zero = values[:4]
    assert zero == 0
    count = ones + twos + fours
    heads = [1] * ones + [2] * twos + [4] * fours
    return [tuple(values[4 + 8 * i : 10 + 8 * i]) for i in range(count)], heads


@pytest.mark.every_order
@pytest.mark.parametrize("past", [0, 5, 200])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lists_every_row_once(backend, lengths, cross, past):
    lengths_k = [n * 3 % 70 for n in lengths] if cross else lengths
    rows_q, rows_k = sum(lengths) + past, sum(lengths_k)
    tiles = attn_tiles(offsets(lengths), offsets(lengths_k), rows_q, rows_k)
    assert tiles.shape == (4 + 8 * tile_capacity(rows_q, len(lengths)),)
    found, heads = listed(tiles)
    assert sorted(found) == sorted(expected_tiles(lengths, lengths_k, rows_q))
    assert heads == [heads_per_block(tile[1], tile[3]) for tile in found]


def test_largest_first(backend):
    lengths = [20, 300, 90, 128, 500, 40, 1, 260]
    cu = offsets(lengths)
    found, heads = listed(attn_tiles(cu, cu, sum(lengths), sum(lengths)))
    costs = [
        -(-tile[1] // 16) * -(-tile[3] // 16)
        for tile, shared in zip(found, heads, strict=True)
        if shared == 1
    ]
    assert all(later < 1.5 * earlier for earlier, later in pairwise(costs))
    assert costs[0] == max(costs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_list_serves_many_calls(backend, dtype):
    lengths = [5, 0, 130, 17, 300, 33]
    cu, rows = offsets(lengths), sum(lengths)
    tiles = attn_tiles(cu, cu, rows, rows)
    for heads, dim in ((1, 64), (3, 32), (5, 16)):
        q, k, v = normal(rows, 3, heads, dim, dtype=dtype).unbind(1)
        own = attn_varlen(q, k, v, cu, cu, 0, 0, 0.2)
        shared = attn_varlen(q, k, v, cu, cu, 0, 0, 0.2, tiles=tiles)
        for a, b in zip(own, shared, strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_wrong_offsets_and_lists_stay_inside_memory(backend, dtype):
    """Nobody reads offsets on the host, so what is wrong in them must not reach other memory."""
    q, k, v = normal(40, 3, 2, 32, dtype=dtype).unbind(1)
    good = offsets([30, 10])
    bad = [
        [0, 50, 40], [-5, 10, 20], [30, 10, 40], [0, 2**31 - 1, 3], [40, 40, 0],
        [0, 30, -(2**31)], [5, 30, 40], [-(2**31), 2**31 - 1, -(2**31)],
    ]  # fmt: skip
    for values in bad:
        cu = torch.tensor(values, dtype=torch.int32)
        for offsets_q, offsets_k in ((cu, good), (good, cu), (cu, cu)):
            out, lse = attn_varlen(q, k, v, offsets_q, offsets_k, 0, 0, 0.2)
            assert out.isfinite().all()  # every row was written
            assert not lse.isnan().any()
    size = 4 + 8 * tile_capacity(40, 2)
    generator = torch.Generator().manual_seed(0)
    for low, high in ((2**30, 2**30 + 1), (-7, -6), (0, 40), (-40, 80), (-(2**31), 2**31)):
        wrong = torch.randint(low, high, (size,), generator=generator, device="cpu")
        for header in ([1, 0, 0, 0], [0, 1, 1, 0], [2**30, -1, 7, 0]):
            wrong[:4] = torch.tensor(header, device="cpu")
            tiles = wrong.int().to(good.device)
            attn_varlen(q, k, v, good, good, 0, 0, 0.2, window=(3, 4), tiles=tiles)
            attn_varlen(q, k, v, good, good, 0, 0, 0.2, tiles=tiles)


def test_refuses_a_list_of_another_size(backend):
    q, k, v = normal(40, 3, 2, 32).unbind(1)
    tiles = attn_tiles(offsets([40]), offsets([40]), 40, 40)
    with pytest.raises(RuntimeError, match="tiles; got"):
        attn_varlen(q, k, v, offsets([30, 10]), offsets([30, 10]), 0, 0, 0.2, tiles=tiles)
    with pytest.raises(RuntimeError, match="as many sequences"):
        attn_tiles(offsets([40]), offsets([30, 10]), 40, 40)
    with pytest.raises(RuntimeError, match="rows"):
        attn_tiles(offsets([40]), offsets([40]), -1, 40)


class _HostGraph:
    """hostcuda's view of a CUDA graph: launches are kept, and repeated on what memory holds."""

    def __init__(self, step) -> None:
        self.kernels = torch.ops.filbert_hostcuda
        self.kernels.record(True)
        try:
            self.out = step()
        finally:
            self.kernels.record(False)

    def replay(self) -> None:
        self.kernels.replay()


class _CudaGraph:
    def __init__(self, step) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = step()

    def replay(self) -> None:
        self.graph.replay()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_captured_graph_is_right_for_other_lengths(backend, dtype):
    """One capture with short texts, replayed with a long one, with none, with many: nothing that
    the host fixed at capture may depend on lengths."""
    rows, sequences, heads, dim = 400, 6, 3, 32
    q, k, v = (t.contiguous() for t in normal(rows, 3, heads, dim, dtype=dtype).unbind(1))
    cu = offsets([3, 2, 1, 4, 2, 1])

    def step():
        tiles = attn_tiles(cu, cu, rows, rows)
        return tiles, *attn_varlen(q, k, v, cu, cu, 4, 4, 0.2, tiles=tiles)

    graph = (_HostGraph if backend == "hostcuda" else _CudaGraph)(step)
    for lengths in (
        [400, 0, 0, 0, 0, 0], [0] * 6, [100, 31, 7, 200, 1, 50], [16] * 6, [66] * 6,
        [33] * 6, [129, 129, 129, 1, 1, 1], [1, 1, 1, 1, 1, 395],
    ):  # fmt: skip
        cu.copy_(offsets(lengths))
        q.copy_(normal(rows, heads, dim, seed=sum(lengths)))
        graph.out[1].fill_(float("nan"))
        graph.replay()
        out, lse = attn_varlen(q, k, v, cu, cu, 0, 0, 0.2)
        assert_exact(graph.out[1], out)
        assert_exact(graph.out[2], lse)
    assert cu.shape == (sequences + 1,)
