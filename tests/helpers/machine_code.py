"""What the compiler made of the CPU's register tiles."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

#: not the installed one, whose names are stripped
LIBRARY = Path(__file__).parents[2] / "build" / "dev" / "libfilbert_ops.so"


def needs_machine_code(test):
    """Skips ``test`` where there is nothing to read, or nothing to read it with."""
    for missing, reason in (
        (shutil.which("objdump") is None, "no objdump to read machine code with"),
        (not LIBRARY.exists(), "built elsewhere than in build/dev"),
    ):
        test = pytest.mark.skipif(missing, reason=reason)(test)
    return test


def stack_moves(functions: str) -> dict[tuple[str, str], list[str]]:
    """Instructions that move a vector to or from the stack, by the instruction set and the name of
    each function whose name fits the pattern ``functions``."""
    code = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(LIBRARY)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = {}
    pattern = rf"^\w+ <([^\n]*filbert::(avx\w+)::[^\n]*{functions}[^\n]*)>:\n(.*?)\n\n"
    for name, isa, body in re.findall(pattern, code, re.MULTILINE | re.DOTALL):
        # Rows' strides may wait in a register of one number.
        moved = r"^.*\b[yz]mm\d+.*\(%[re]sp.*$|^.*\(%rsp.*[yz]mm\d+.*$"
        found[isa, name] = re.findall(moved, body, re.MULTILINE)
    return found
