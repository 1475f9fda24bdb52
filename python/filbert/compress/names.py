"""Numbers for layers, by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["first_that_fits"]

T = TypeVar("T")


def first_that_fits(name: str, given: Mapping[str, T | None]) -> T | None:
    """What the first key that fits a name stands for, or None.

    Args:
        name: of a layer.
        given: keys are names, or ``"re:"`` and a pattern that is found in one.
    """
    fits = (
        value for key, value in given.items()
        if (re.search(key[3:], name) if key.startswith("re:") else key == name)
    )  # fmt: skip
    return next(fits, None)
