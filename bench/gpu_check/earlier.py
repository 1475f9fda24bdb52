"""What an earlier call in the same folder left, and whether it was about the same thing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..environment import ROOT
from .libraries import NAMES

#: what the steps run besides the libraries
TREE = ("bench", "python", "tests")


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def digests(folder: Path) -> dict[str, str]:
    """Of the libraries in ``folder``, and of every Python file of the tree."""
    sources = sorted(path for part in TREE for path in (ROOT / part).rglob("*.py"))
    present = [folder / name for name in NAMES if (folder / name).exists()]
    return {"libraries": _digest(present), "tree": _digest(sources)}


def load(out: Path) -> dict[str, Any] | None:
    """The earlier report, its log under ``"log"``; None where there is none, or none to be read."""
    try:
        data = json.loads((out / "gpu-check.json").read_text(encoding="utf-8"))
        log = (out / "gpu-check.log").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return {**data, "log": log} if isinstance(data, dict) else None
