"""``make test-avx512``: every copy of the CPU kernels against ``base``, without torch.

The copies that this processor has run on it. Those of newer ones that it lacks run in an emulated
machine, where Debian's packages for that are installed or can be. See docs/avx512.md.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import machine

#: what `emulated` and the other copies cannot stand for
WIDE = ["avx512", "avx512_vpopcnt", "avx512_vnni", "avx512_bf16", "avx2_vnni"]


def say(line: str) -> None:
    print(f"test-avx512: {line}", flush=True)


def run(*command: str | Path) -> int:
    return subprocess.run([str(part) for part in command], check=False).returncode


def emulate(check: Path, copies: list[str], folder: Path, timeout: float) -> str | None:
    """Runs the copies of the machine's model that are wanted; says what is wrong, if anything."""
    begin = time.monotonic()
    say(f"{', '.join(copies)}: in Bochs, as {machine.MODEL}")
    lines = machine.run(check, ["--copies", ",".join(copies)], folder, timeout)
    named = [copy for copy in copies if any(copy in line.split() for line in lines)]
    say(f"Bochs took {time.monotonic() - begin:.0f} s")
    # The last line is all that tells how it ended.
    last = f"{check.name}: exit "
    if not lines or not lines[-1].startswith(last):
        return f"the emulated machine did not get to its end; see {folder}/*.txt"
    if lines[-1] != f"{last}0":
        return "a copy in the emulated machine is wrong"
    if named != copies:
        return f"the emulated machine ran {named}, not {copies}: nothing is proven"
    return None


def main(argv: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("build", type=Path, help="the folder with kernel_check")
    top.add_argument("--emulate", action="store_true", help="even what this processor has")
    top.add_argument(
        "--if-possible", action="store_true", help="succeed where no emulator can be had"
    )
    top.add_argument("--timeout", type=float, default=600, help="seconds for the emulator")
    options = top.parse_args(argv)
    check = options.build.resolve() / "kernel_check"
    folder = options.build.resolve() / "machine"
    folder.mkdir(exist_ok=True)

    if run(options.build / "kernel_check_planted"):
        say("FAILED: the cases do not see a planted fault")
        return 1
    native = subprocess.run(
        [check, "--list"], check=True, capture_output=True, text=True
    ).stdout.split()
    if run(check):
        say("FAILED")
        return 1

    if platform.machine() not in ("x86_64", "AMD64"):
        say(f"ok; {platform.machine()} has no AVX-512 copies")
        return 0
    wanted = [copy for copy in WIDE if options.emulate or copy not in native]
    emulated = [copy for copy in wanted if copy in machine.COPIES]
    beyond = [copy for copy in wanted if copy not in machine.COPIES and copy not in native]
    if beyond:
        say(f"NOT RUN: {', '.join(beyond)}: neither this processor nor {machine.MODEL} has it")
    if emulated:
        if (missing := machine.provide(folder)) is not None:
            say(f"NOT RUN: {', '.join(emulated)}: {missing}")
            return 0 if options.if_possible else 1
        if (wrong := emulate(check, emulated, folder, options.timeout)) is not None:
            say(f"FAILED: {wrong}")
            return 1
    say("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
