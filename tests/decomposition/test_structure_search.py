from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kruify.decomposition import Fit, fit, structure_search
from kruify.decomposition.fitting import metric_of
from kruify.decomposition.structure_search import StructureSearch
from kruify.factors import Structure, Term, two_factor_shapes


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best(w, parameters, multiply_adds=None, covariance=None) -> Fit:
    """The best of the three structures that a search puts first."""
    search = StructureSearch(w, metric_of(covariance, w.shape[1]))
    found = [search.fitted(c.structure) for c in search.candidates(parameters, multiply_adds)[:3]]
    return max(found, key=lambda pair: pair[1])[0]


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
    found = best(w, parameters, multiply_adds)
    assert found.structure.parameters <= parameters
    assert multiply_adds is None or found.structure.multiply_adds <= multiply_adds
    for structure in single_shapes(32, 32, parameters, multiply_adds):
        assert found.energy >= fit(w, structure).energy - 1e-10
    assert best(w, parameters, multiply_adds).structure == found.structure


def test_the_structure_that_made_the_matrix_is_found():
    w = sum(torch.kron(gaussian(4, 8, seed=i), gaussian(8, 4, seed=i + 5)) for i in range(2))
    w = w + gaussian(32, 1, seed=20) @ gaussian(1, 32, seed=21)
    found = best(w, 2 * 64 + 128)
    assert found.energy == pytest.approx(1, abs=1e-6)


def test_weighted_choice_beats_the_plain_one_in_output():
    w, h = gaussian(32, 32), gaussian(40, 32, seed=3) * torch.logspace(0, -2, 32, dtype=torch.float64)
    c = h.T @ h / 40
    plain, weighted = best(w, 256), best(w, 256, covariance=c)

    def error(f):
        return float(((w - f.to_dense()) @ h.T).square().sum())

    assert error(weighted) < error(plain)


def test_weighted_terms_are_no_more_than_their_systems_serve(monkeypatch):
    """At H = 1024 a hundred terms of 2x512,512x2 would ask for 49 GB."""
    monkeypatch.setattr(structure_search, "SHAPES_LIMIT", 100)
    monkeypatch.setattr(structure_search, "WEIGHTED_LIMIT_LARGE", 12)
    w, h = gaussian(16, 16), gaussian(30, 16, seed=1)
    found = [c.structure.terms[0] for c in StructureSearch(w, metric_of(h.T @ h / 30, 16)).singles(200)]
    ranks = {term.factors: term.rank for term in found}
    assert ranks.pop(((16, 1), (1, 16))) == 6
    assert ranks and all(rank == min(12 // max(q for _, q in shapes), 3) for shapes, rank in ranks.items())


def test_tiny_budgets_fall_back_on_many_factors_and_impossible_ones_on_nothing():
    w = torch.kron(torch.kron(gaussian(4, 2, seed=1), gaussian(2, 4, seed=2)), gaussian(4, 4, seed=3))
    found = best(w, 40)
    assert found.structure.parameters <= 40 and len(found.structure.terms[0].factors) >= 3
    assert StructureSearch(gaussian(32, 32), metric_of(None, 32)).candidates(3) == []


def test_every_rank_that_fills_a_budget_keeps_what_the_svd_says():
    w = gaussian(24, 16)
    search = StructureSearch(w, metric_of(None, 16))
    low = next(c for c in search.singles(400) if c.structure.terms[0].factors == search.low_rank())
    found = search.ranks(low, 600)
    ranks = [c.structure.terms[0].rank for c in found]
    assert ranks[0] == 15 and ranks[-1] == 1 and all(0 < a - b <= 2 for a, b in pairwise(ranks))
    kept = torch.linalg.svdvals(w).square().cumsum(0) / w.square().sum()
    assert [c.energy for c in found] == pytest.approx([float(kept[rank - 1]) for rank in ranks], abs=1e-5)
    weighted = StructureSearch(w, metric_of(torch.eye(16), 16))  # where a spectrum is only a guide, it decides nothing
    for single in weighted.singles(400):
        assert bool(weighted.ranks(single, 600)) is (single.structure.terms[0].factors == weighted.low_rank())
