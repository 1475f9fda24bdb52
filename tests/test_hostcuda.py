"""The harness on trial: what it must catch, it catches; what its wrappers compute, they compute."""

from __future__ import annotations

import pytest
import torch

from cases import normal
from filbert.ops._linear_binary import binary_product, reference_linear_binary_bits
from filbert.ops.shared.words import codes_to_words, weight_to_tiles, words_to_bits
from tolerances import assert_exact

X = torch.arange(64.0) + 1
SEEDS = range(12)

#: kernel that is wrong in one way -> what the error has to say, the kernel's name aside
CAUGHT = {
    "read_past": "thread 56: out of bounds: operand 0 .* 0 bytes after its end",
    "write_past": "thread 56: out of bounds: operand 1 .* 0 bytes after its end",
    "write_input": "thread 0: out of bounds: operand 0 .* only to be read",
    "wide_read_past": "thread 60: out of bounds: a load of 16 bytes: operand 0",
    "shared_past": "thread 4: out of bounds",
    "shared_before": "wrote outside of its shared memory",
    "shared_address_past": "out of bounds: st.shared.b32 at byte 256 of 256",
    "half_a_barrier": "divergence: 40 of 64 threads wait.* __syncthreads, and 24 have returned",
    "early_return": "divergence: 63 of 64 threads wait.* __syncthreads, and 1 have returned",
    "half_a_shuffle": "divergence: 32 of 64 threads wait.* __shfl_sync, and 32 have returned",
    "two_collectives": "divergence: at __syncwarp while other lanes of its warp are at __shfl_sync",
    "one_collective_twice": "divergence: at __shfl_sync while other .* are at another one",
    "misaligned_load": "alignment: a load of 16 bytes at an address that is no multiple of 16",
    "misaligned_copy": "alignment: cp.async at byte 8",
    "never_waits": "copies under way that it never waited for",
}


@pytest.mark.parametrize(("kernel", "message"), CAUGHT.items(), ids=CAUGHT.keys())
def test_catches(hostcuda, kernel, message):
    with pytest.raises(RuntimeError, match=f"kernel {kernel}, block 0.*{message}"):
        hostcuda.sheet(X, kernel)
    assert_exact(hostcuda.sheet(X, "reversed"), X.flip(0))  # and goes on working after it


def test_catches_a_write_before_an_operand(hostcuda):
    with pytest.raises(RuntimeError, match="written just outside of operand 1"):
        hostcuda.sheet(X, "write_before")


@pytest.mark.parametrize(
    ("kernel", "lost"),
    [("uninitialised", 64), ("unwritten", 1), ("no_wait", 33), ("waits_for_too_few", 33)],
)
def test_what_was_never_there_is_nan(hostcuda, kernel, lost):
    """Shared memory, outputs and the destination of a copy start as NaN. (Where a wait is missing,
    each thread's own copy lands at its end, so that later threads see the earlier ones'.)"""
    assert int(hostcuda.sheet(X, kernel).isnan().sum()) == lost


def by_seed(hostcuda, kernel):
    for seed in SEEDS:
        hostcuda.set_seed(seed)
        yield hostcuda.sheet(X, kernel)


@pytest.mark.parametrize("kernel", ["race", "overwrites_what_is_read"])
def test_a_race_changes_with_the_seed(hostcuda, kernel):
    results = {tuple(out.nan_to_num(-1.0).tolist()) for out in by_seed(hostcuda, kernel)}
    assert len(results) > 1


def test_a_right_kernel_does_not(hostcuda):
    for out in by_seed(hostcuda, "reversed"):
        assert_exact(out, X.flip(0))


@pytest.mark.parametrize(
    ("blocks", "threads", "shared"), [(1, 2048, 0), (1, 33, 0), (1, 32, 240_000)]
)
def test_refuses_launches_no_gpu_takes(hostcuda, blocks, threads, shared):
    hostcuda.launch_of(1, 32, 1024)
    with pytest.raises(RuntimeError, match="no GPU launches"):
        hostcuda.launch_of(blocks, threads, shared)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fragments(hostcuda, dtype):
    """ldmatrix, ldmatrix.trans and mma.m16n8k16 together are a matrix product, exact in float32 on
    small integers whose rows and columns all differ."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-9, 10, s, generator=generator).to(dtype) for s in ((16, 16), (16, 8)))
    c = normal(16, 8).round()
    expected = a.float() @ b.float() + c
    hostcuda.product_(a, b, c)
    assert_exact(c, expected)


@pytest.mark.parametrize("words", [4, 8])
def test_bit_fragments(hostcuda, words):
    """The one-bit mma of 128 and of 256 bits count common ones."""
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randint(-(2**31), 2**31, (rows, words), generator=generator).to(torch.int32)
        for rows in (16, 8)
    )
    c = normal(16, 8).round().to(torch.int32)
    counts = [words_to_bits(t, 32 * words) for t in (a, b)]
    expected = c + (counts[0] @ counts[1].T).to(torch.int32)
    hostcuda.bit_product_(a, b, c)
    assert_exact(c, expected)


def test_tensor_core_product_of_bytes(hostcuda):
    """mma.m16n8k32 of unsigned and signed bytes; every value of both is there."""
    generator = torch.Generator().manual_seed(1)
    a = torch.cat([torch.arange(256), torch.randint(0, 256, (256,), generator=generator)])
    b = torch.arange(-128, 128)[torch.randperm(256, generator=generator)]
    a, b = a.to(torch.uint8).view(16, 32), b.to(torch.int8).view(8, 32)
    c = normal(16, 8).round().to(torch.int32)
    expected = c + (a.to(torch.int32) @ b.to(torch.int32).T)
    hostcuda.byte_product_(a, b, c)
    assert_exact(c, expected)


@pytest.mark.parametrize("value", [0, 9, 132, 2**31 - 1])
def test_a_device_is_asked_once_whatever_it_answers(hostcuda, value):
    assert hostcuda.asked(3, value) == 1
    assert hostcuda.asked(64, value) == 3  # more devices than are remembered


@pytest.mark.parametrize("capability", [75, 80, 90, 100, 120])
def test_capability(hostcuda, capability):
    """Whatever multiplies bits, tensor cores or ordinary ones, the results are the same."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 4, (37, 100), generator=generator)
    bits = torch.randint(0, 2, (70, 100), generator=generator)
    words, sums = codes_to_words(codes, 2)
    tiles, totals = weight_to_tiles(bits), (2 * bits.sum(1) - 100).to(torch.int32)
    threshold = torch.randint(-30, 30, (70,), generator=generator).to(torch.int32)
    operands = (words, sums, tiles, totals)
    try:
        hostcuda.set_capability(capability)
        got = hostcuda.linear_binary_bits(*operands, threshold, 1, -1)
        numbers = hostcuda.linear_binary(*operands, torch.ones(70), None, None, 1, -1)
    finally:
        hostcuda.set_capability(90)
    for ours, meant in zip(
        got, reference_linear_binary_bits(*operands, threshold, 1, -1), strict=True
    ):
        assert_exact(ours, meant)
    assert_exact(numbers, binary_product(*operands, 1, -1).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numbers(hostcuda, dtype):
    """Every 16-bit pattern widens, and floats of every size round, as in PyTorch."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert_exact(hostcuda.widened(patterns), patterns.float())
    bits = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32)
    near = patterns.float()[patterns.isfinite()]
    halfway = near * (1 + torch.finfo(dtype).eps / 2)  # ties
    for values in (bits.view(torch.float32), near, halfway, halfway.nextafter(near)):
        assert_exact(hostcuda.narrowed(values, torch.empty(0, dtype=dtype)), values.to(dtype))
