"""The three rules by which a result is right, and no others.

*exact* for packing and integer arithmetic; *close to native* for floats: the error against the
float64 answer is at most twice the error of the same computation in PyTorch at the same dtype;
*cosine* as a second look at quantised results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from filbert.ops._quantize_rows import reference_quantize_rows


def assert_exact(ours: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bits (NaN equals NaN)."""
    assert ours.shape == expected.shape, f"shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
    assert ours.dtype == expected.dtype, f"dtype {ours.dtype}, not {expected.dtype}"
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    if not same.all():
        where = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"first difference at {where}: {ours[where]} is not {expected[where]}")


def _error(result: Tensor, exact: Tensor) -> Tensor:
    """Absolute error; where the exact value is infinite, 0 if the result agrees and inf if not."""
    error = (result.double() - exact).abs()
    infinite = exact.isinf()
    return torch.where(infinite, torch.where(result.double() == exact, 0.0, torch.inf), error)


def assert_close_to_native(
    ours: Tensor, native: Tensor, exact: Tensor, factor: float = 2.0, room: float = 0.0
) -> None:
    """Largest error of ``ours`` is at most ``factor`` times that of ``native``, plus one rounding.

    Args:
        ours: filbert's result.
        native: PyTorch's result of the same computation in the dtype of ``ours``.
        exact: the float64 answer. Non-finite values must agree in ``ours``.
        room: what the hardware's own sums may add to that, where native's are of another kind.
    """
    assert ours.shape == exact.shape, f"shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return
    unknown = exact.isnan()
    assert torch.equal(ours.isnan(), unknown), (
        "NaN where the exact answer has none, or none where it has"
    )
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    one_rounding = torch.finfo(ours.dtype).eps * scale
    error = _error(ours, exact).nan_to_num(0.0, posinf=torch.inf)
    allowed = factor * float(_error(native, exact).nan_to_num(0.0, posinf=0.0).max()) + one_rounding
    allowed += room
    worst = int(error.argmax())
    assert float(error.max()) <= allowed, (
        f"error {float(error.max()):.3e} at flat index {worst}: got {ours.flatten()[worst]}, exact "
        f"{exact.flatten()[worst]}; allowed {allowed:.3e} ({factor} times native's error)"
    )


def assert_cosine(ours: Tensor, exact: Tensor, at_least: float) -> None:
    """Cosine between the flattened tensors."""
    cosine = torch.nn.functional.cosine_similarity(
        ours.double().flatten(), exact.double().flatten(), dim=0
    )
    assert float(cosine) >= at_least, f"cosine {float(cosine):.6f} is below {at_least}"


def assert_codes(ours: Sequence[Tensor], wide: Tensor) -> None:
    """``ours`` are codes, scale and zero of ``wide``, of which the kernel has its own last bits."""
    codes, scale, zero = ours
    assert codes.shape == wide.shape
    if wide.numel() == 0:
        return
    theirs, their_scale, their_zero = reference_quantize_rows(wide)
    assert torch.allclose(scale, their_scale, rtol=1e-5, equal_nan=True)
    assert int((zero - their_zero).abs().max()) <= 1
    back = scale[:, None] * (codes.float() - zero[:, None])
    known = their_scale[:, None] * (theirs.float() - their_zero[:, None])
    # Half of a step each way where a number lies between two codes, and a moved zero.
    assert bool(((back - known).abs() <= 1.01 * their_scale[:, None]).all())
    assert float((codes != theirs).float().mean()) < 0.02
