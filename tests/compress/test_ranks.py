"""Factors of weights and ranks under a budget, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import normal
from filbert.compress.lowrank import Spectrum, break_even, plan_ranks, spectrum_of

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 7), (7, 1)]


def rows_of(inputs: int, count: int = 300) -> Tensor:
    """Rows whose directions differ in size, as those of a LayerNorm with outliers."""
    sizes = torch.logspace(1, -2, inputs)
    return (
        normal(count, inputs, seed=4) * sizes @ torch.linalg.qr(normal(inputs, inputs, seed=5))[0]
    )


def lost(weight: Tensor, spectrum: Spectrum, rank: int, rows: Tensor | None) -> float:
    error = spectrum.factors(rank).weight.double() - weight.double()
    return float((error if rows is None else rows.double() @ error.T).square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
def test_energy_is_what_a_rank_loses(shape, whitened):
    weight = normal(*shape)
    rows = rows_of(shape[1]) if whitened else None
    spectrum = spectrum_of(weight, rows.double().T @ rows.double() if whitened else None)
    total = float(spectrum.energy.sum())
    for rank in range(1, min(shape) + 1):
        left = float(spectrum.energy[rank:].sum())
        assert lost(weight, spectrum, rank, rows) == pytest.approx(left, rel=1e-3, abs=1e-9 * total)
        assert spectrum.kept(rank) == pytest.approx(1 - left / total, abs=1e-9)


def test_plain_is_the_singular_value_decomposition():
    weight = normal(30, 20)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    made = spectrum_of(weight).factors(7).weight.double()
    expected = u[:, :7] * s[:7] @ v[:7]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_whitened_loses_less_on_the_rows_and_on_others(shape):
    weight, rows = normal(*shape), rows_of(shape[1], 600)
    seen, held = rows[:400], rows[400:]
    whitened = spectrum_of(weight, seen.T @ seen)
    for rank in (2, 6, 12):
        assert lost(weight, whitened, rank, held) < 0.7 * lost(
            weight, spectrum_of(weight), rank, held
        )


def test_rows_that_span_little_are_no_trouble():
    """Two rows, or none but zeros: nothing is divided by what was not seen."""
    weight, rows = normal(20, 30), rows_of(30, 2)
    for moments in (rows.T @ rows, torch.zeros(30, 30)):
        factors = spectrum_of(weight, moments).factors(5)
        assert factors.a.isfinite().all()
        assert factors.b.isfinite().all()
    two = spectrum_of(weight, rows.T @ rows)
    assert lost(weight, two, 2, rows) < 1e-6 * float((rows @ weight.T).square().sum())


def test_factors_of_a_smaller_rank_are_its_own():
    spectrum = spectrum_of(normal(24, 40), rows_of(40).T @ rows_of(40))
    cut, own = spectrum.factors(20).cut(9), spectrum.factors(9)
    assert cut.rank == 9
    assert torch.equal(cut.a, own.a)
    assert torch.equal(cut.b, own.b)


def test_fisher_weights_choose_the_outputs_that_cost():
    weight = normal(20, 30)
    fisher = torch.full((20,), 1e-3)
    fisher[:4] = 10.0
    weighted, plain = spectrum_of(weight, fisher=fisher), spectrum_of(weight)
    for rank in (3, 8):

        def error(spectrum: Spectrum, rank: int = rank) -> Tensor:
            return (spectrum.factors(rank).weight - weight).square().sum(1)

        assert error(weighted)[:4].sum() < 0.2 * error(plain)[:4].sum()
    silent = torch.zeros(20)
    assert spectrum_of(weight, fisher=silent).factors(3).weight.isfinite().all()


def test_refuses_what_does_not_fit():
    weight = normal(6, 8)
    for given, said in (
        ({"moments": torch.zeros(6, 6)}, "moments: got"),
        ({"fisher": torch.ones(8)}, "fisher: got"),
        ({"fisher": -torch.ones(6)}, "fisher: has values"),
        ({"weight": weight * torch.nan}, "weight: has values"),
    ):
        with pytest.raises(ValueError, match=said):
            spectrum_of(**({"weight": weight} | given))
    for rank in (0, 7):
        with pytest.raises(ValueError, match="need 1 to 6"):
            spectrum_of(weight).factors(rank)


def spectra() -> dict[str, Spectrum]:
    """One weight that is nearly of rank 8, one that is of none."""
    low = normal(96, 8) @ normal(8, 128, seed=1) + 0.01 * normal(96, 128, seed=2)
    return {"low": spectrum_of(low), "full": spectrum_of(normal(128, 96, seed=3))}


def test_ranks_go_where_they_keep_most():
    ranks = plan_ranks(spectra(), param_ratio=0.5)
    assert ranks["low"] == 16
    assert ranks["full"] is not None
    assert ranks["full"] > 16
    used = sum(rank * 224 for rank in ranks.values() if rank)
    assert used <= 0.5 * 2 * 96 * 128
    assert used + 16 * 224 > 0.5 * 2 * 96 * 128


def test_a_whole_budget_keeps_what_is_of_full_rank():
    assert plan_ranks(spectra(), param_ratio=1.0)["full"] is None
    assert all(rank is None or rank < break_even(96, 128)
               for rank in plan_ranks(spectra(), param_ratio=0.9).values())  # fmt: skip


def test_energy_is_kept_by_the_least_rank():
    found = spectra()
    ranks = plan_ranks(found, energy=0.95)
    assert ranks["low"] == 16
    assert ranks["full"] is None or found["full"].kept(ranks["full"]) >= 0.95
    few = plan_ranks(found, energy=0.3)["full"]
    assert few is not None
    assert found["full"].kept(few) >= 0.3 > found["full"].kept(few - 16)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({}, "need one of"), ({"param_ratio": 0.5, "energy": 0.9}, "need one of"),
        ({"param_ratio": 0.0}, "param_ratio: got 0.0"), ({"energy": 1.5}, "energy: got 1.5"),
        ({"param_ratio": 0.01}, "need room for ranks of 16"),
    ],
)  # fmt: skip
def test_refuses_budgets(budget, said):
    with pytest.raises(ValueError, match=said):
        plan_ranks(spectra(), **budget)
