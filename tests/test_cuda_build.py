"""What nvcc made of the CUDA kernels, read back from what it said and from the machine code.

No GPU is needed for this. Where there is no nvcc nothing was built, and these tests say so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "dev"
OBJECTS = BUILD / "CMakeFiles" / "filbert_cuda.dir"
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc here, so libfilbert_cuda was not built"
)

#: kernel -> registers a thread may have: 168 let three blocks of 128 threads or two of 192 share
#: a multiprocessor, 255 two of 128, 128 four of 128 or two of 256; the row kernels live from many
#: warps at once; a kernel that is not here may have what a thread can have
REGISTERS = {
    r"attn_varlen_kernel<(fp16|bf16), 32, false>": 128,
    r"attn_varlen_kernel<(fp16|bf16), 64, false>": 168,
    r"attn_varlen_kernel": 255,
    r"attn_varlen_f32_kernel": 168,
    r"attn_tiles_kernel": 64,
    r"norm_residual_kernel<(fp16|bf16), [123], (true|false)>": 128,
    r"norm_residual_kernel": 255,
    r"norm_residual_(wide|unaligned)_kernel": 96,
    r"bias_gelu_(any_)?kernel": 64,
    r"gather_rows_kernel": 64,
    r"linear_binary_kernel": 128,
    r"linear_(popcount|binary_sums)_kernel": 64,
    r"attn_binary_kernel": 168,
    r"pack_bits_kernel": 64,
    r"quantize_rows_kernel": 64,
    r"embedding_grouped_kernel": 64,
    r"linear_grouped_kernel<2, 4, .*>": 128,
    r"linear_grouped_kernel<2, 2, 1, 2, .*>": 96,
    r"linear_grouped_few_kernel": 80,
    r"ffn_lowrank_kernel<(fp16|bf16), 64, 128, .*>": 168,
    r"ffn_lowrank_lift_kernel": 96,
    r"linear_lowrank_kernel<(fp16|bf16), 64, 128>": 168,
}


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture, as ptxas reports it."""

    mangled: str
    architecture: str
    registers: int
    stack: int
    spilled: int

    @property
    def name(self) -> str:
        """``attn_varlen_kernel<fp16, 64, false>``, from the mangled name."""
        for name in re.findall(
            r"\d((?:attn|norm|bias|embedding|ffn|gather|linear|pack|quantize)\w*?_kernel)",
            self.mangled,
        ):
            rest = self.mangled.partition(name)[2]
            values = re.findall(r"\d(fp16|bf16|Bit)E|Li(\d+)E|Lb([01])E", rest)
            words = [t or n or ("true" if b == "1" else "false") for t, n, b in values]
            return f"{name}<{', '.join(words)}>" if words else name
        return self.mangled

    @property
    def allowed(self) -> int:
        return next((n for pattern, n in REGISTERS.items() if re.match(pattern, self.name)), 255)


def reports() -> list[Kernel]:
    found = []
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for path in OBJECTS.rglob("*.ptxas"):
        if not (ROOT / path.relative_to(OBJECTS).with_suffix("")).exists():
            continue  # of a source that was moved since, in a folder that was built before
        for mangled, arch, stack, stores, loads, registers in entry.findall(path.read_text()):
            spilled = int(stores) + int(loads)
            found.append(Kernel(mangled, arch, int(registers), int(stack), spilled))
    return found


@needs_nvcc
def test_every_kernel_was_compiled_for_every_architecture():
    by_name = defaultdict(set)
    for kernel in reports():
        by_name[kernel.name].add(kernel.architecture)
    assert len(set(map(frozenset, by_name.values()))) == 1, dict(by_name)
    for dtype in ("fp16", "bf16"):
        for dim in (32, 64, 128):
            for biased in ("false", "true"):
                assert f"attn_varlen_kernel<{dtype}, {dim}, {biased}>" in by_name
        for rank in (128, 256):
            for rows, split in ((128, "false"), (64, "false"), (64, "true")):
                assert f"ffn_lowrank_kernel<{dtype}, {rows}, {rank}, {split}>" in by_name
            assert f"ffn_lowrank_lift_kernel<{dtype}, 64, {rank}>" in by_name
            for rows in (64, 128):
                assert f"linear_lowrank_kernel<{dtype}, {rows}, {rank}>" in by_name
    for tiling in ("2, 4, 4, 2", "1, 4, 2, 1"):
        for out in ("Bit", "fp16", "bf16"):
            assert f"linear_binary_kernel<{tiling}, {out}>" in by_name
    for bits in (2, 3, 4, 6, 8):
        for scaled in ("false", "true"):
            strips = 2 if scaled == "true" and bits > 4 else 4  # multipliers after the product
            for tiling in (f"2, 4, {strips}, 2, 2", "2, 2, 1, 2, 4"):
                assert f"linear_grouped_kernel<{tiling}, {bits}, {scaled}>" in by_name
            assert f"linear_grouped_few_kernel<{bits}, {scaled}>" in by_name
    for name in ("attn_varlen_f32_kernel", "attn_tiles_kernel", "linear_binary_sums_kernel"):
        assert name in by_name
    for kind in ("attn_binary_kernel", "pack_bits_kernel", "linear_popcount_kernel"):
        assert any(name.startswith(kind) for name in by_name), kind


@needs_nvcc
def test_nothing_spills_and_registers_stay_in_bounds():
    kernels = reports()
    assert kernels, f"nvcc is here, and no reports of it in {BUILD.name}; build with make"
    wrong = [k for k in kernels if k.spilled or k.stack or k.registers > k.allowed]
    assert not wrong, wrong


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or the one that PyPI has."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(packaged))


#: tiles through shared memory by 16 bytes, in and out
TILES = [r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"LDGSTS\S*\.128", r"STG\.E\.128"]
#: common ones of bits, counted on tensor cores
BITS_256, BITS_128 = (rf"BMMA\.168{n}\.AND\.POPC" for n in (256, 128))
#: unsigned codes by signed numbers, on tensor cores
IMMA = r"IMMA\.16832\.U8\.S8"
LDSM = r"LDSM\.16\.M88\.4"
#: kernel (a pattern of its mangled name) -> instructions it is made for
INSTRUCTIONS = {
    r"attn_varlen_kernelINS0_4fp16": [r"HMMA\.16816\.F32 ", *TILES],
    r"attn_varlen_kernelINS0_4bf16": [r"HMMA\.16816\.F32\.BF16", *TILES],
    r"norm_residual_kernel": [r"LDG\.E\.128", r"STG\.E\.128"],
    r"bias_gelu_kernel": [r"LDG\.E\.128", r"STG\.E\.128"],
    r"gather_rows_kernelI5uint4": [r"LDG\.E\.128", r"STG\.E\.128"],
    r"linear_binary_kernel": [BITS_256, r"LDSM\.16\.M88\.4", r"LDS\.64", r"LDGSTS\S*\.128"],
    r"linear_binary_kernelI.*?EEEfEE": [r"STG\.E\.128"],
    r"linear_binary_kernelI.*?4(fp16|bf16)": [r"STG\.E\.64"],
    r"attn_binary_kernelILi2E": [BITS_128, r"LDGSTS\S*\.128", r"STS\.128"],
    r"attn_binary_kernelILi4E": [BITS_256, BITS_128, r"LDGSTS\S*\.128", r"STS\.128"],
    r"linear_popcount_kernel": [r"\bPOPC\b"],
    r"linear_grouped_kernel": [IMMA, r"LDSM\.16\.M88\.4", r"LDS\.64", r"LDGSTS\S*\.128"],
    r"linear_grouped_few_kernel": [IMMA, r"LDSM\.16\.M88\.4", r"LDG\.E\.64"],
    r"ffn_lowrank_kernelINS0_4fp16": [r"HMMA\.16816\.F32 ", LDSM, r"LDGSTS\S*\.128"],
    r"ffn_lowrank_kernelINS0_4bf16": [r"HMMA\.16816\.F32\.BF16", LDSM, r"LDGSTS\S*\.128"],
    r"linear_lowrank_kernel": [r"HMMA\.16816\.F32", LDSM, r"LDGSTS\S*\.128"],
    r"ffn_lowrank_lift_kernel": [LDSM, r"LDG\.E\.128", r"STG\.E\.128"],
    r"pack_bits_kernelI.*?Lb1ELb[01]E": [r"LDG\.E\.128"],
}


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump to disassemble with")
def test_the_machine_code_has_what_was_meant(tmp_path):
    """Tensor cores, 16-byte accesses and no local memory, in the machine code of every kernel."""
    tool = cuobjdump()
    assert tool is not None
    path = str(Path(tool).parent)
    dump = subprocess.run(
        [tool, "--dump-sass", str(BUILD / "libfilbert_cuda.so")],
        capture_output=True, text=True, check=True, timeout=300, env={"PATH": path},
    )  # fmt: skip
    functions = re.split(r"Function : (\w+)", dump.stdout)[1:]
    code = list(zip(functions[::2], functions[1::2], strict=True))
    assert len(code) == len(reports())
    for name, sass in code:
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} uses local memory"
    for kernel, instructions in INSTRUCTIONS.items():
        bodies = [sass for name, sass in code if re.search(kernel, name)]
        assert bodies, kernel
        for instruction in instructions:
            assert all(re.search(instruction, sass) for sass in bodies), (kernel, instruction)
