"""Few row counts for the GEMM library, and a server's memory that does not grow with its texts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_packed_encoder import hidden_states, packed

from filbert.nn.row_blocks import block_size, by_blocks, fill_up, filled_rows
from filbert.packed.batch import PackedBatch
from models import MASKS
from tiny_model import python_environment
from tolerances import assert_exact

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("threads", [1, 4, 5, 64])
def test_sizes_are_few_and_close(threads):
    block = block_size(threads)
    assert block >= max(512, 128 * threads)
    sizes = {filled_rows(rows, block) for rows in range(block + 1)} - {0}
    assert len(sizes) <= 40 + 8 * (block // 512).bit_length()
    for rows in range(1, 3 * block + 1):
        filled = filled_rows(rows, block)
        last = (rows - 1) % block + 1
        assert rows <= filled < rows + max(4, last / 8)
        assert filled == filled_rows(filled, block)
        assert (filled - 1) % block + 1 in sizes


def test_rows_are_filled_up_with_zeros():
    rows = torch.randn(13, 8)
    filled = fill_up(rows, 512)
    assert filled.shape == (16, 8)
    assert_exact(filled[:13], rows)
    assert_exact(filled[13:], torch.zeros(3, 8))
    assert fill_up(filled, 512) is filled


@pytest.mark.parametrize("pooled", [None, "cls"])
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_change_nothing_but_rounding(mask, pooled):
    encoder = packed("bert", torch.float32)
    batch = PackedBatch.from_mask(MASKS[mask])
    rows = encoder.pack(hidden_states(MASKS[mask], torch.float32), batch)
    given = rows.clone()
    whole = encoder.forward_packed(rows, batch, pooled)
    for layer in encoder.layers:
        layer.row_block = 8
    by_blocks = encoder.forward_packed(rows, batch, pooled)
    torch.testing.assert_close(by_blocks, whole, rtol=1e-5, atol=1e-5)
    assert_exact(rows, given)


def test_results_go_over_an_operand_that_is_like_them():
    rows, other = torch.randn(20, 8), torch.randn(20, 8)
    expected = rows * 2 + other
    for function, shared in (
        (lambda a, b: a * 2 + b, True),
        (lambda a, b: (a * 2 + b).double(), False),
        (lambda a, b: (a * 2 + b)[:, :4], False),
    ):
        over = rows.clone()
        made = by_blocks(function, 6, over, other, over=True)
        assert (made.data_ptr() == over.data_ptr()) == shared
        assert_exact(made.float(), expected[:, : made.shape[1]])
        assert shared or torch.equal(over, rows)


def test_what_a_hook_keeps_of_attention_stays_as_it_was():
    encoder = packed("bert", torch.float32)
    batch = PackedBatch.from_mask(MASKS["right"])
    rows = encoder.pack(hidden_states(MASKS["right"], torch.float32), batch)
    layer, kept = encoder.layers[0], []
    layer.row_block = 8
    hook = layer.attention.register_forward_hook(lambda _, __, y: kept.append((y, y.clone())))
    layer(rows, batch)
    hook.remove()
    ((context, then),) = kept
    assert_exact(context, then)


SERVE = """
import random, sys, torch, filbert
from transformers import BertConfig, BertModel

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

torch.set_num_threads(1)
config = BertConfig(
    vocab_size=100, hidden_size=384, num_hidden_layers=1, num_attention_heads=12,
    intermediate_size=1536, max_position_embeddings=64,
)
model = filbert.convert(BertModel(config).eval())
random.seed(1)
marks = []
for call in range(2001):
    lengths = [random.randint(3, 60) for _ in range(4)]
    ids = torch.ones(4, max(lengths), dtype=torch.long)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    with torch.inference_mode():
        model(ids, attention_mask=mask)
    if call in (0, 500, 2000):
        marks.append(resident())
print(*marks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_variety_of_lengths():
    """2,000 calls of four texts of 3 to 60 tokens, nearly each with a number of rows of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVE],
        capture_output=True, text=True, timeout=600, env=python_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start, middle, end = map(float, done.stdout.split())
    assert end - start < 30  # MiB; one primitive a row count would take some 400
    # The allocator has met all sizes by then; 48 bytes that leak a call would pin some 30 MiB.
    assert end - middle < 5
