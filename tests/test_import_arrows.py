"""Imports point one way, as docs/architecture.md says: a storey knows none above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import filbert

ROOT = Path(__file__).parent.parent / "python" / "filbert"
#: lowest first; modules of one storey may know each other
STOREYS = (
    {"_load", "refusals"},
    {"ops"},
    {"info"},
    {"packed"},
    {"plan"},
    {"nn"},
    {"compress", "conversion"},
    {"graphs"},
    {"app"},
    {"__init__", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(STOREYS) for name in names}


def storey_of(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The top-level names inside filbert that a module imports, wherever in it."""
    inside = path.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = inside[: len(inside) - node.level]
        names = (node.module or "").split(".") if node.module else []
        if base or names:
            found.add(storey_of((*base, *names)))
        else:
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_a_storey():
    there = {storey_of(path.relative_to(ROOT).parts) for path in ROOT.rglob("*.py")}
    assert there == set(LEVEL)
    assert Path(filbert.__file__).name == "__init__.py"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = LEVEL[storey_of(path.relative_to(ROOT).parts)]
    up = {name for name in imported(path) if LEVEL.get(name, own) > own}
    assert not up
