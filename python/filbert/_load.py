"""Finds and loads the operator libraries, and remembers in words why one is missing.

Importing filbert must work on every machine: with no compiler at install time, with a library
built for another torch, with no GPU. What could not be loaded is kept as a sentence that
:func:`filbert.info` prints and that the first use of a fallback warns about, once.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

#: the introspection module ``filbert._C``, or None
C: ModuleType | None = None
#: why a library is not loaded, by library name; empty when all is well
missing: dict[str, str] = {}
#: the folder that holds the libraries, once it is known
folder: Path | None = None

_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Warns with ``reason`` the first time it is given in this process."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(reason, RuntimeWarning, stacklevel=3)


def _load_ops() -> None:
    """Importing ``_C`` loads libfilbert_ops, whose static initialisers register the operators.

    ``_C`` belongs to one Python, libfilbert_ops to none: where only the library is there, built
    elsewhere, the operators run and what ``_C`` tells about them is missing. The environment
    variable ``FILBERT_LIBRARY_DIR`` names a folder to look in.
    """
    global C, folder
    given = os.environ.get("FILBERT_LIBRARY_DIR")
    try:
        if given is None:
            C = importlib.import_module("filbert._C")
            folder = Path(str(C.__file__)).parent / "lib"
            return
        torch.ops.load_library(str(Path(given) / "libfilbert_ops.so"))
        folder = Path(given)
    except (ImportError, OSError) as error:
        missing["ops"] = (
            f"the compiled library libfilbert_ops could not be loaded ({error}); "
            f"found torch {torch.__version__}, need torch>=2.10; "
            "try reinstalling filbert with a C++17 compiler present"
        )


def _load_cuda() -> None:
    if folder is None:
        missing["cuda"] = missing["ops"]
        return
    if torch.version.cuda is None:
        missing["cuda"] = f"this torch ({torch.__version__}) is built without CUDA"
        return
    library = folder / "libfilbert_cuda.so"
    if not library.exists():
        missing["cuda"] = "filbert was built without CUDA kernels"
        return
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        missing["cuda"] = f"libfilbert_cuda could not be loaded: {error}"
        return
    toolkit = str(torch.ops.filbert.cuda_architectures()).rpartition("CUDA ")[2]
    if int(toolkit.partition(".")[0]) > int(torch.version.cuda.partition(".")[0]):
        missing["cuda"] = (
            f"libfilbert_cuda was built with CUDA {toolkit}, this torch is for CUDA "
            f"{torch.version.cuda}, and so may be the driver; try building filbert with nvcc "
            f"{torch.version.cuda}"
        )


_load_ops()
_load_cuda()


def have_ops() -> bool:
    """True when the compiled CPU operators are registered."""
    return "ops" not in missing


def isa() -> str:
    """The instruction set that the CPU kernels use, in a word."""
    return str(C.isa()) if C is not None else "some instruction set" if have_ops() else "reference"


@cache
def _why_not_this_gpu(index: int) -> str | None:
    """Why no kernel can run on that GPU, or None."""
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU here"
    return why_not_capability(
        torch.cuda.get_device_capability(index), torch.ops.filbert.cuda_architectures()
    )


def why_not_capability(capability: tuple[int, int], built: str) -> str | None:
    """Why a GPU of that compute capability cannot run a library built for ``built``, or None.

    ``built`` is ``"sm 80-real 90, CUDA 13.0"``: machine code runs on its own major version from its
    minor version on; what is not ``-real`` is there as PTX too, and runs on everything later. Code
    for ``90a`` runs on 9.0 alone and code for ``100f`` on 10.0 and what follows in its major
    version, PTX included.
    """
    for name in built.partition(",")[0].split()[1:]:
        digits, _, kind = name.partition("-")
        number = digits.rstrip("af")
        major, minor = int(number[:-1]), int(number[-1])
        same_family = capability[0] == major and capability[1] >= minor
        if digits.endswith("a"):
            runs = capability == (major, minor)
        elif digits.endswith("f"):
            runs = same_family
        else:
            runs = (kind != "virtual" and same_family) or (
                kind != "real" and capability >= (major, minor)
            )
        if runs:
            return None
    return (
        f"libfilbert_cuda is built for {built}, this GPU has compute capability "
        f"{capability[0]}.{capability[1]}; 8.0 or newer can be built for with FILBERT_CUDA_ARCHS"
    )


def why_no_kernels(device: torch.device) -> str | None:
    """Why there are no kernels for tensors on ``device``, or None if there are."""
    if device.type in ("cpu", "meta"):
        return None if have_ops() else missing["ops"]
    if device.type != "cuda":
        return "need cpu or cuda, filbert has no kernels for others"
    if "cuda" in missing:
        return missing["cuda"]
    index = torch.cuda.current_device() if device.index is None else device.index
    return _why_not_this_gpu(index)
