"""Finds and loads the operator libraries, and remembers in words why one is missing.

Importing filbert must work on every machine: with no compiler at install time, with a library
built for another torch, with no GPU. What could not be loaded is kept as a sentence that
:func:`filbert.info` prints and that the first use of a fallback warns about, once.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

#: the introspection module ``filbert._C``, or None
C: ModuleType | None = None
#: why a library is not loaded, by library name; empty when all is well
missing: dict[str, str] = {}

_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Warns with ``reason`` the first time it is given in this process."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, RuntimeWarning, stacklevel=3)


def _load_ops() -> None:
    """Importing ``_C`` loads libfilbert_ops, whose static initialisers register the operators."""
    global C
    try:
        C = importlib.import_module("filbert._C")
    except ImportError as error:
        missing["ops"] = (
            f"the compiled library libfilbert_ops could not be loaded ({error}); "
            f"found torch {torch.__version__}, need torch>=2.10; "
            "try reinstalling filbert with a C++17 compiler present"
        )


def _load_cuda() -> None:
    if C is None:
        missing["cuda"] = missing["ops"]
        return
    if torch.version.cuda is None:
        missing["cuda"] = f"this torch ({torch.__version__}) is built without CUDA"
        return
    library = Path(str(C.__file__)).parent / "lib" / "libfilbert_cuda.so"
    if not library.exists():
        missing["cuda"] = "filbert was built without CUDA kernels"
        return
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        missing["cuda"] = f"libfilbert_cuda could not be loaded: {error}"


_load_ops()
_load_cuda()


def have_ops() -> bool:
    """True when the compiled CPU operators are registered."""
    return C is not None
