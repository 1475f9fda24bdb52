"""Runs a compiler and keeps what it says beside the object file: python keep_report.py nvcc ...

``nvcc -Xptxas -v`` prints registers and spills of every kernel, and a build tool throws that away.
The tests read it (tests/test_cuda_build.py).
"""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
if "-o" in command:
    output = Path(command[command.index("-o") + 1])
    output.with_suffix(".ptxas").write_text(done.stderr, encoding="utf-8")
quiet = ("ptxas info", "bytes stack frame", "Function properties")
for line in done.stderr.splitlines():
    if not any(word in line for word in quiet):
        print(line, file=sys.stderr)
sys.exit(done.returncode)
