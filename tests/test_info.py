"""info, explain, the instruction-set switch, and an import that stays light."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import filbert
from cases import normal, offsets
from filbert import _load


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_import_is_light():
    """No transformers, no CUDA context: importing filbert must cost what importing torch costs."""
    result = run_python(
        "import sys, torch, filbert\n"
        "print([m for m in ('transformers', 'pyarrow', 'onnx') if m in sys.modules])\n"
        "print(torch.cuda.is_initialized())"
    )
    assert result.stdout.split("\n")[:2] == ["[]", "False"], result.stdout + result.stderr


def test_works_without_the_compiled_library():
    """A broken install still imports, says why, warns once, and computes by the reference."""
    result = run_python(
        "import sys, warnings\n"
        "sys.modules['filbert._C'] = None  # what a missing or broken library looks like\n"
        "import torch, filbert\n"
        "q, k, v = torch.randn(5, 3, 2, 8).unbind(1)\n"
        "cu = torch.tensor([0, 2, 5], dtype=torch.int32)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): out, lse = filbert.attn_varlen(q, k, v, cu, cu, 3, 3, 0.3)\n"
        "    one, x = torch.ones(4), torch.ones(2, 4)\n"
        "    filbert.norm_residual(x, None, None, one, one, 1e-5)\n"
        "    filbert.norm_residual_(x, None, None, one, one, 1e-5)\n"
        "    filbert.bias_gelu_(torch.ones(2, 4))\n"
        "print(len(caught), out.shape, 'libfilbert_ops' in str(caught[0].message))\n"
        "print('libfilbert_ops' in str(filbert.info()))\n"
        "print(filbert.explain('attn_varlen', q)['kernel'])"
    )
    assert result.stdout.splitlines() == [
        "1 torch.Size([5, 2, 8]) True",
        "True",
        "reference code",
    ], result.stdout + result.stderr


def test_info_names_every_operator():
    text = str(filbert.info())
    assert torch.__version__ in text
    assert _load.C.isa() in text
    for op in ("attn_varlen", "norm_residual", "bias_gelu_"):
        assert op in filbert.info()["operators"]


def test_python_m_filbert_prints_info():
    result = subprocess.run(
        [sys.executable, "-m", "filbert"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "instruction set" in result.stdout


@pytest.mark.parametrize("isa", _load.C.isas() if _load.C else [])
def test_environment_selects_the_instruction_set(isa):
    code = "import filbert; print(filbert._load.C.isa())"
    assert run_python(code, FILBERT_CPU_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_said_and_ignored():
    result = run_python("import filbert; print(filbert._load.C.isa())", FILBERT_CPU_ISA="avx9000")
    assert result.stdout.strip() == _load.C.isas()[0]
    assert "avx9000" in result.stderr
    with pytest.raises(ValueError, match="avx9000"):
        _load.C.select_isa("avx9000")


def test_the_widest_kernels_have_a_stand_in():
    """512-bit vectors and bfloat16 pairs are tested on every machine, natively or emulated."""
    assert {"base", "emulated"} <= set(_load.C.isas())


def plan(lengths, heads=12, threads=2):
    cu = offsets(lengths).tolist()
    return _load.C.plan_attn_varlen(cu, cu, heads, 64, False, threads)


@pytest.mark.parametrize("threads", [1, 2, 16, 64])
@pytest.mark.parametrize("lengths", [[1], [400], [5, 0, 300, 7], [20] * 64, [], [0, 0]], ids=str)
def test_plan_covers_every_query_once(lengths, threads):
    result = plan(lengths, threads=threads)
    covered = set()
    for sequence, head_begin, head_end, q_begin, q_end in result["tasks"]:
        assert q_end > q_begin
        for head in range(head_begin, head_end):
            for row in range(q_begin, q_end):
                assert (sequence, head, row) not in covered
                covered.add((sequence, head, row))
    assert len(covered) == 12 * sum(lengths)
    assert result["multiply_adds"] == 2 * 12 * 64 * sum(n * n for n in lengths)


def test_plan_starts_with_the_largest_and_shares_a_single_text():
    sequences = [task[0] for task in plan([3, 90, 20])["tasks"]]
    assert sequences == sorted(sequences, key=lambda s: -[3, 90, 20][s])
    assert len(plan([512], heads=2, threads=16)["tasks"]) >= 16


def blocks_of(heads: int, longest: int) -> torch.Tensor:
    """Blocks that self-attention needs for one text of 0 .. ``longest`` tokens: the rule of the
    work list, told again."""
    n = torch.arange(longest + 1)
    shared = torch.where(n <= 16, 4, torch.where(n <= 32, 2, 1))  # heads to a block
    return -(-n // 128) * -(-heads // shared)


def self_blocks(rows: int, sequences: int, heads: int) -> int:
    return _load.C.plan_attn_varlen_cuda(rows, sequences, heads, 64, False, True)["blocks"]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 12, 13, 16])
def test_cuda_plan_of_self_attention_is_never_too_small(heads):
    """Against the largest sum there is over all lengths, for all small shapes: what is found one
    sequence at a time, the rows that none owns being one more."""
    rows, sequences = 420, 9
    blocks = blocks_of(heads, rows)
    most = blocks.clone()  # [rows + 1], of one sequence
    for count in range(sequences):
        for total in range(1, rows + 1):
            bound = self_blocks(total, count, heads)
            assert most[total] <= bound, (total, count)
            # a line through two corners overshoots between them, by less than one step
            assert bound - most[total] < heads, (total, count)
        table = torch.full((rows + 1, rows + 1), -1)
        for n in range(rows + 1):
            table[n, n:] = most[: rows + 1 - n] + blocks[n]
        most = table.amax(0)


def test_cuda_plan_of_self_attention_for_large_batches():
    """Random lengths, and those that make the bound: the first of each step of the rule."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, count: int = 1) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    for trial in range(400):
        count, heads = int(draw(1, 3000)), (1, 4, 6, 12, 16, 25)[trial % 6]
        longest = (4, 20, 40, 150, 300, 2000)[int(draw(0, 6))]
        lengths = draw(0, longest + 1, count)
        if trial % 3 == 0:
            corners = torch.tensor([0, 1, 16, 17, 32, 33, 128, 129, 256, 257])
            share = torch.rand(10, generator=generator) ** 4
            lengths = corners[share.multinomial(count, replacement=True, generator=generator)]
        rest = int(draw(0, 300)) * (trial % 2)  # rows that no sequence owns
        rows = int(lengths.sum()) + rest
        blocks = blocks_of(heads, max(longest, 300))
        needed = int(blocks[lengths].sum() + blocks[rest])
        assert needed <= self_blocks(rows, count, heads), (lengths.bincount(), rest, heads)
    # 16 tokens at most: most of the grid was for texts that could have been longer
    assert self_blocks(32768, 3413, 12) < 0.45 * 12 * (32768 // 128 + 3414)


@pytest.mark.parametrize("dim", [8, 32, 40, 64, 96, 128])
@pytest.mark.parametrize("lengths", [[1], [400], [5, 0, 300, 7], [20] * 64, [129] * 9, [], [0]])
def test_cuda_plan_has_a_block_for_every_item(lengths, dim):
    """The grid is fixed by shapes alone, and large enough for any lengths that fit them."""
    rows, heads = sum(lengths), 12
    plan = _load.C.plan_attn_varlen_cuda(rows, len(lengths), heads, dim, False, False)
    assert plan["blocks"] == (rows // 128 + len(lengths) + 1) * heads * (rows > 0)
    items = sum(int(blocks_of(heads, n)[n]) for n in lengths)
    own = _load.C.plan_attn_varlen_cuda(rows, len(lengths), heads, dim, False, True)
    assert items <= own["blocks"] <= plan["blocks"]
    assert plan["threads"] == 128
    assert plan["tile_dim"] == next(width for width in (32, 64, 128) if dim <= width)
    # Q, K and V of 128 rows; 99 KiB is what a block may have on the smallest GPUs of 8.6 and 8.9
    assert plan["shared_bytes"] == 3 * 128 * plan["tile_dim"] * 2 <= 99 * 1024


def test_cuda_plan_of_float32():
    plan = _load.C.plan_attn_varlen_cuda(100, 3, 2, 128, True, False)
    assert plan["shared_bytes"] <= 99 * 1024
    assert plan["blocks"] == 8
    with pytest.raises(ValueError, match="1 to 128 columns"):
        _load.C.plan_attn_varlen_cuda(100, 3, 2, 136, False, False)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 0), "sm 80-real 86-real 89-real 90, CUDA 13.0", True),
        ((8, 7), "sm 80-real 90, CUDA 13.0", True),
        ((9, 0), "sm 80-real 86-real 89-real 90, CUDA 13.0", True),
        ((12, 0), "sm 80-real 86-real 89-real 90, CUDA 13.0", True),  # from PTX
        ((12, 0), "sm 80-real 90-real, CUDA 13.0", False),
        ((8, 0), "sm 90, CUDA 13.0", False),
        ((8, 9), "sm 80-virtual, CUDA 13.0", True),
        ((7, 5), "sm 80-real 90, CUDA 13.0", False),
        ((10, 0), "sm 100-real, CUDA 13.0", True),
        ((9, 0), "sm 90a, CUDA 13.0", True),
        ((9, 0), "sm 90a-real, CUDA 13.0", True),
        ((10, 0), "sm 90a, CUDA 13.0", False),
        ((10, 3), "sm 100a 120, CUDA 13.0", False),
        ((10, 3), "sm 80-real 100f, CUDA 13.0", True),
        ((12, 0), "sm 100f, CUDA 13.0", False),
    ],
)
def test_which_gpus_a_build_runs_on(capability, built, runs):
    reason = _load.why_not_capability(capability, built)
    assert (reason is None) == runs
    if not runs:
        assert f"compute capability {capability[0]}.{capability[1]}" in reason


def test_explain():
    q, k, v = normal(100, 3, 12, 64).unbind(1)
    cu = offsets([30, 70])
    text = str(filbert.explain("attn_varlen", q, k, v, cu, cu))
    assert _load.C.isa() in text
    named = filbert.explain("attn_varlen", q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, window=(3, 3))
    assert named["longest keys"] == 70
    for op in ("norm_residual", "norm_residual_", "bias_gelu_"):
        assert "bytes" in filbert.explain(op, normal(4, 8), None, None)["memory"]
    with pytest.raises(ValueError, match="got 'attention'"):
        filbert.explain("attention", q)
