from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from kruify.decomposition import choose, fit
from kruify.decomposition.fit import metric_of
from kruify.errors import UnsupportedError, UsageError
from kruify.factors import Structure, Term, two_factor_shapes

choose_module = importlib.import_module("kruify.decomposition.choose")  # the package's `choose` is the function


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def single_shapes(rows, cols, parameters, multiply_adds=None):
    for shapes in two_factor_shapes(rows, cols):
        one = Term(shapes)
        rank = parameters // one.parameters
        if multiply_adds is not None:
            rank = min(rank, multiply_adds // one.multiply_adds)
        if rank:
            yield Structure(rows, cols, (replace(one, rank=rank),))


@pytest.mark.parametrize("kind", ["gaussian", "kronecker", "low rank", "sparse"])
@pytest.mark.parametrize(("parameters", "multiply_adds"), [(200, None), (400, 300)])
def test_never_less_energy_than_any_single_shape_at_equal_cost(kind, parameters, multiply_adds):
    w = 0.1 * gaussian(32, 32)
    if kind == "kronecker":
        w += torch.kron(gaussian(4, 8, seed=1), gaussian(8, 4, seed=2))
    if kind == "low rank":
        w += gaussian(32, 2, seed=1) @ gaussian(2, 32, seed=2)
    if kind == "sparse":
        w[8:16, 5] += 3
    found = choose(w, parameters, multiply_adds=multiply_adds)
    assert found.structure.parameters <= parameters
    assert multiply_adds is None or found.structure.multiply_adds <= multiply_adds
    for structure in single_shapes(32, 32, parameters, multiply_adds):
        assert found.energy >= fit(w, structure, null=False).energy - 1e-10
    assert choose(w, parameters, multiply_adds=multiply_adds).structure == found.structure


def test_the_structure_that_made_the_matrix_is_found():
    w = sum(torch.kron(gaussian(4, 8, seed=i), gaussian(8, 4, seed=i + 5)) for i in range(2))
    w = w + gaussian(32, 1, seed=20) @ gaussian(1, 32, seed=21)
    found = choose(w, 2 * 64 + 128)
    assert found.energy == pytest.approx(1, abs=1e-6)


def test_weighted_choice_beats_the_plain_one_in_output():
    w, h = gaussian(32, 32), gaussian(40, 32, seed=3) * torch.logspace(0, -2, 32, dtype=torch.float64)
    c = h.T @ h / 40
    plain, weighted = choose(w, 256), choose(w, 256, covariance=c)

    def error(f):
        return float(((w - f.to_dense()) @ h.T).square().sum())

    assert error(weighted) < error(plain)


@pytest.mark.parametrize(
    ("seed", "rows", "cols", "parameters", "kind"),
    [  # of the first three a search that trusts its guide misses the best shape
        (19, 16, 16, 80, "few directions"),
        (27, 12, 12, 64, "one sided"),
        (29, 12, 16, 64, "few directions"),
        (3, 16, 8, 90, "plain"),
    ],
)
def test_a_weighted_choice_never_keeps_less_than_any_single_shape(seed, rows, cols, parameters, kind):
    w, h = gaussian(rows, cols, seed=seed), gaussian(30, cols, seed=seed + 7)
    if kind == "few directions":
        h = h[:6]
    if kind == "one sided":
        h = h * torch.logspace(0, -3, cols, dtype=torch.float64) + 2
    c = h.T @ h / len(h)
    found = choose(w, parameters, covariance=c)
    assert found.structure.parameters <= parameters
    for structure in single_shapes(rows, cols, parameters):
        single = fit(w, structure, covariance=c, null=False).energy_weighted
        assert found.energy_weighted >= single - 1e-5, str(structure)  # the fit's own norm is damped by 1e-6


def test_weighted_terms_are_no_more_than_their_systems_serve(monkeypatch):
    """At H = 1024 a hundred terms of 2x512,512x2 would ask for 49 GB."""
    monkeypatch.setattr(choose_module, "SHAPES_LIMIT", 100)
    monkeypatch.setattr(choose_module, "WEIGHTED_LIMIT_LARGE", 12)
    w, h = gaussian(16, 16), gaussian(30, 16, seed=1)
    search = choose_module.Search(w, metric_of(h.T @ h / 30, 16))
    found = [s.terms[0] for s in search.every_single(200)]
    assert [term.factors for term in found] == [
        ((16, 1), (1, 16)),
        ((4, 4), (4, 4)),
        ((2, 8), (8, 2)),
        ((8, 2), (2, 8)),
    ]
    assert [term.rank for term in found] == [6, 3, 1, 1]
    assert choose(w, 200, covariance=h.T @ h / 30).structure.parameters <= 200


def test_tiny_budgets_fall_back_on_many_factors_and_impossible_ones_are_named():
    w = torch.kron(torch.kron(gaussian(4, 2, seed=1), gaussian(2, 4, seed=2)), gaussian(4, 4, seed=3))
    found = choose(w, 40)
    assert found.structure.parameters <= 40 and len(found.structure.terms[0].factors) >= 3
    with pytest.raises(UsageError, match="parameters"):
        choose(gaussian(32, 32), 3)
    with pytest.raises(UsageError):
        choose(torch.zeros(0, 4), 10)
    with pytest.raises(UnsupportedError):
        choose(torch.full((4, 4), float("nan")), 10)
