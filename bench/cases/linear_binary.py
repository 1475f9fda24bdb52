"""A linear layer of ±1 weights: PyTorch's dense GEMM on the same numbers, and filbert on bits.

The dense contestants multiply floats that happen to be ±1, which costs what any floats cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ours import compiled_filbert
from ..peak import Work, kind_of
from ..results import Row
from ..runner import Options, on_gpu
from ..sweep import sweep
from ..timing import Contestant

NAME = "linear_binary"
ABOUT = (
    "±1 weights: F.linear, oneDNN packed, filbert with 1, 2, 4 and 8 bits in, numbers or bits out"
)
REFERENCE = "F.linear"
BITS_OUT = "filbert 1 bit, bits out"
RATE = ("multiply_adds_per_s", "GMAC/s", 1e-9)
RATE_ON_GPU = ("multiply_adds_per_s", "TMAC/s", 1e-12)
#: integers are exact; what differs is one rounding of the scale and the bias
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}


@dataclass(frozen=True)
class Size:
    """``rows`` rows through a layer of ``inputs`` and ``outputs``."""

    rows: int
    inputs: int
    outputs: int


#: the layers of BERT-base; rows from one token to a large batch
WORKLOADS = {
    f"{inputs}x{outputs}-m{rows}": Size(rows, inputs, outputs)
    for inputs, outputs in ((768, 768), (768, 3072), (3072, 768))
    for rows in (1, 16, 512, 2048, 8192)
}
#: 8192 rows are for a GPU
DEFAULT = tuple(name for name in WORKLOADS if not name.endswith("-m8192"))


class _Layer:
    """One layer in every form it is run in."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        filbert = compiled_filbert()
        self.ops, self.dtype, self.size = filbert.ops, dtype, size
        self.x = torch.randn(size.rows, size.inputs, generator=generator).to(dtype).to(device)
        latent = torch.randn(size.outputs, size.inputs, generator=generator)
        bits = (latent > 0).to(device)
        self.alpha = latent.abs().mean(1).to(device)
        self.bias = torch.randn(size.outputs, generator=generator).to(device)
        self.tiles, self.totals = filbert.nn.weight_tiles(bits)
        self.dense = (self.alpha[:, None] * (2.0 * bits - 1)).to(dtype)
        self.signs = torch.where(self.x > 0, 1.0, -1.0).to(dtype)
        # y >= 0, at the dot where it changes
        self.threshold = torch.ceil(-self.bias / self.alpha).to(torch.int32)

    def right_answer(self, x: Tensor | None = None) -> Tensor:
        rows = (self.signs if x is None else x).double()
        signs = torch.where(self.dense > 0, 1.0, -1.0).double()
        return rows @ signs.T * self.alpha.double() + self.bias.double()

    def linear(self) -> Contestant:
        bias = self.bias.to(self.dtype)
        return Contestant(REFERENCE, lambda: F.linear(self.signs, self.dense, bias), lambda y: y)

    def packed(self) -> Contestant:
        from filbert.nn.dense.backends import OneDNN
        from filbert.nn.dense.linear import row_dtype

        rows = row_dtype(self.dtype, self.x.device)
        layer, signs, bias = OneDNN(self.dense, rows), self.signs.to(rows), self.bias.to(rows)
        return Contestant(
            "oneDNN packed", lambda: layer.product(signs, bias, None), lambda y: y,
            note=layer.kernel,
        )  # fmt: skip

    def numbers_out(self) -> Contestant:
        """Packing the rows is timed."""

        def run() -> Tensor:
            words, sums = self.ops.pack_bits(self.x)
            return self.ops.linear_binary(
                words, sums, self.tiles, self.totals, self.alpha, self.bias, dtype=self.dtype
            )

        return Contestant("filbert 1 bit", run, lambda y: y)

    def bits_out(self) -> Contestant:
        """Bits in, bits out: what a layer between layers does. Checked by its bits."""
        words, sums = self.ops.pack_bits(self.x)

        def run() -> tuple[Tensor, Tensor]:
            return self.ops.linear_binary_bits(words, sums, self.tiles, self.totals, self.threshold)

        # Numbers whose bits are these, since what is checked are numbers.
        size = self.right_answer()

        def result(value: tuple[Tensor, Tensor]) -> Tensor:
            from filbert.ops.shared.words import words_to_bits

            bits = words_to_bits(value[0][0], self.size.outputs)
            return torch.where(bits == 1, size.abs(), -size.abs())

        return Contestant(BITS_OUT, run, result)

    def codes_in(self, bits: int) -> Contestant:
        """Inputs of more bits, of ±1 as for the others: their scale makes that exact."""
        low = -(2 ** (bits - 1))
        scale = torch.ones(self.size.rows, device=self.x.device)

        def run() -> Tensor:
            words, sums, used = self.ops.pack_codes(self.signs, bits, low, scale)
            return self.ops.linear_binary(
                words, sums, self.tiles, self.totals, self.alpha, self.bias, used,
                step=1, low=low, dtype=self.dtype,
            )  # fmt: skip

        return Contestant(f"filbert {bits} bits", run, lambda y: y)

    def contestants(self) -> dict[str, Callable[[], Contestant]]:
        found: dict[str, Callable[[], Contestant]] = {REFERENCE: self.linear}
        if self.x.device.type == "cpu":
            found["oneDNN packed"] = self.packed
        found["filbert 1 bit"] = self.numbers_out
        found[BITS_OUT] = self.bits_out
        for bits in (2, 4, 8):
            found[f"filbert {bits} bits"] = lambda bits=bits: self.codes_in(bits)  # type: ignore[misc]
        return found


def work(size: Size, dtype: torch.dtype, who: str) -> Work:
    """Multiply-adds of a plane of bits, or of floats; each operand once."""
    count = float(size.rows * size.inputs * size.outputs)
    out = size.rows * size.outputs
    if who and not who.startswith("filbert"):
        rows, weight = size.rows * size.inputs, size.inputs * size.outputs
        return Work({kind_of(dtype): 2 * count}, (rows + weight + out) * dtype.itemsize)
    planes = int(who.split()[1]) if who else 1
    words = (planes * size.rows + size.outputs) * size.inputs // 8
    return Work(
        {"bits": planes * count}, words + (out // 8 if who == BITS_OUT else out * dtype.itemsize)
    )


def run(options: Options) -> list[Row]:
    """Checks and times every size asked for."""
    return sweep(
        options, WORKLOADS, _Layer, work,
        figure=RATE[0], reference=lambda _: REFERENCE, tolerance=TOLERANCE,
        default=("*",) if on_gpu(options.device) else DEFAULT,
    )  # fmt: skip
