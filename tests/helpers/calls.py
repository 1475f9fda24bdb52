"""One small, valid call of every operator."""

from __future__ import annotations

import torch

from cases import normal, offsets
from filbert import ops

CU, WORDS = offsets([3, 2]), torch.zeros(1, 5, 1, dtype=torch.int32)
SUMS, TILES = torch.zeros(5, dtype=torch.int32), torch.zeros(1, 1, 16, dtype=torch.int32)
TOTALS = torch.zeros(8, dtype=torch.int32)
BITS = torch.zeros(5, 1, dtype=torch.int32)
LIMITS = torch.zeros(32, dtype=torch.int32)


def norm_operands():
    names = ("x", "bias", "residual", "weight", "beta")
    return {n: normal(5, 8) if n in ("x", "residual") else normal(8) for n in names}


def grouped_operands():
    return {
        "x": normal(5, 8), "scale": normal(8), "bias": normal(8), "residual": normal(5, 8),
        "norm_weight": normal(8), "norm_bias": normal(8),
    }  # fmt: skip


def grouped_weight():
    weight = ops.pack_grouped(torch.full((8, 8), 3, dtype=torch.uint8), 3)
    return {"weight": weight, "totals": TOTALS - 8, "bits": 3}


#: operator -> (its function, its float operands by name, the other arguments)
CALLS = {
    "attn_varlen": lambda: (
        ops.attn_varlen,
        {"q": normal(5, 2, 8), "k": normal(5, 2, 8), "v": normal(5, 2, 8),
         "alibi_slopes": normal(2), "key_bias": normal(5)},
        {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 3, "max_seqlen_k": 3,
         "scale": 1.0},
    ),
    "norm_residual": lambda: (ops.norm_residual, norm_operands(), {"eps": 1e-5}),
    "norm_residual_": lambda: (ops.norm_residual_, norm_operands(), {"eps": 1e-5}),
    "norm_residual_codes": lambda: (ops.norm_residual_codes, norm_operands(), {"eps": 1e-5}),
    "bias_gelu_": lambda: (ops.bias_gelu_, {"x": normal(5, 8), "bias": normal(8)}, {}),
    "gather_rows": lambda: (ops.gather_rows, {"x": normal(5, 8)}, {"index": torch.arange(3)}),
    "pack_bits": lambda: (ops.pack_bits, {"x": normal(5, 8), "threshold": normal(8)}, {}),
    "pack_codes": lambda: (
        ops.pack_codes, {"x": normal(5, 8), "scale": normal(5).abs()}, {"bits": 4, "low": 0}
    ),
    "linear_dense": lambda: (
        ops.linear_dense,
        {"x": normal(5, 8), "bias": normal(8), "residual": normal(5, 8),
         "norm_weight": normal(8), "norm_bias": normal(8)},
        {"weight": ops.pack_dense(normal(8, 8)), "outputs": 8},
    ),
    "ffn_lowrank": lambda: (
        ops.ffn_lowrank,
        {"x": normal(5, 8), "up_bias": normal(12), "down_bias": normal(8),
         "residual": normal(5, 8), "norm_weight": normal(8), "norm_bias": normal(8)},
        {"up_a": ops.pack_dense(normal(3, 8)), "up_b": ops.pack_dense(normal(12, 3)),
         "down_a": ops.pack_dense(normal(4, 12)), "down_b": ops.pack_dense(normal(8, 4)),
         "up_rank": 3, "inner": 12, "down_rank": 4, "outputs": 8},
    ),
    "linear_lowrank": lambda: (
        ops.linear_lowrank,
        {"x": normal(5, 8), "bias": normal(8), "residual": normal(5, 8),
         "norm_weight": normal(8), "norm_bias": normal(8)},
        {"a": ops.pack_dense(normal(3, 8)), "b": ops.pack_dense(normal(8, 3)), "rank": 3,
         "outputs": 8},
    ),
    "attn_lowrank": lambda: (
        ops.attn_lowrank,
        {"latent": normal(5, 3), "bias": normal(48), "key_bias": normal(5)},
        {**dict.fromkeys(("query", "key", "value"), ops.pack_heads(normal(16, 3), 2)),
         "cu_seqlens": CU, "max_seqlen": 3, "head_dim": 8, "ranks": [3, 3, 3], "scale": 1.0},
    ),
    "linear_binary": lambda: (
        ops.linear_binary,
        {"alpha": normal(8), "bias": normal(8), "scale": normal(5), "residual": normal(5, 8),
         "norm_weight": normal(8), "norm_bias": normal(8)},
        {"words": WORDS, "sums": SUMS, "weight": TILES, "totals": TOTALS},
    ),
    "quantize_rows": lambda: (
        ops.quantize_rows,
        {"x": normal(5, 8), "scale": normal(1).abs()},
        {"zero": torch.zeros(1, dtype=torch.int32)},
    ),
    "linear_grouped": lambda: (ops.linear_grouped, grouped_operands(), grouped_weight()),
    "linear_grouped_codes": lambda: (
        ops.linear_grouped_codes, grouped_operands(), grouped_weight()
    ),
    "embedding_grouped": lambda: (
        ops.embedding_grouped,
        {"scale": normal(6), "norm_weight": normal(8), "norm_bias": normal(8)},
        {"ids": torch.zeros(5, dtype=torch.int64),
         "codes": torch.zeros(6, 8, dtype=torch.uint8), "width": 8},
    ),
    # integers only, which cannot require a gradient
    "attn_tiles": lambda: (
        ops.attn_tiles, {}, {"cu_seqlens_q": CU, "cu_seqlens_k": CU, "rows_q": 5, "rows_k": 5}
    ),
    "attn_binary": lambda: (
        ops.attn_binary, {},
        {"q": BITS, "k": BITS, "v": BITS, "cu_seqlens": CU, "max_seqlen": 3, "heads": 1,
         "head_dim": 32, "threshold": LIMITS, "table": torch.zeros(33, dtype=torch.int64)},
    ),
    "linear_binary_bits": lambda: (
        ops.linear_binary_bits, {},
        {"words": WORDS, "sums": SUMS, "weight": TILES, "totals": TOTALS, "threshold": LIMITS[:8],
         "until": LIMITS[:8], "lower": LIMITS[:8], "lower_until": LIMITS[:8]},
    ),
}  # fmt: skip
