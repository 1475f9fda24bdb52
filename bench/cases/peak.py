"""What this processor can do at most: the yardstick of every share of the peak."""

from __future__ import annotations

from .. import peak
from ..results import Row, unavailable
from ..runner import Options, on_gpu
from ..timing import Unavailable

NAME = "peak"
ABOUT = "the processor's peaks on one core and on all: FMA, bfloat16 pairs, int8, bits, a copy"
REFERENCE = "one core"
RATE = ("per_s", "G/s", 1e-9)
WORKLOADS = {
    **{kind: about for kind, (_, about) in peak.LOOPS.items()},
    peak.COPY: "bytes read and written",
}


def run(options: Options) -> list[Row]:
    """Measures every peak; what there is no instruction for has a row that says so."""
    if on_gpu(options.device):
        raise ValueError(
            f"--device: got {options.device!r}, need 'cpu'; a GPU's ceilings are measured by every "
            "case that runs on it"
        )
    rows = []
    for kind, about in WORKLOADS.items():
        for who, threads in ((REFERENCE, 1), (f"{options.threads} threads", options.threads)):
            try:
                rate = peak.measure(kind, threads)
            except Unavailable as error:
                rows.append(unavailable(kind, about, who, REFERENCE, str(error)))
                continue
            rows.append(Row(kind, about, who, REFERENCE, "ok", figures={"per_s": rate}))
    return rows
