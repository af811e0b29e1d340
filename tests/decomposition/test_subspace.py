"""What a search fits with: never more than a thorough fit keeps, and close to it."""

from __future__ import annotations

import pytest
import torch

from kruify.decomposition import weighted
from kruify.decomposition.fitting import fit_with
from kruify.decomposition.frobenius import Frobenius
from kruify.decomposition.rearrangement import rearrange
from kruify.decomposition.sparse_residual import heaviest
from kruify.decomposition.structure_search import StructureSearch
from kruify.decomposition.subspace import SubspaceFrobenius
from kruify.decomposition.svd import follow, truncated_svd
from kruify.decomposition.vectors import VectorSum
from kruify.decomposition.weighted import Weighted
from kruify.factors import parse, two_factor_shapes

SPECS = ["4*(24x1,1x24)+3*(4x6,6x4)", "6*(24x1,1x24)+sparse:6%:8", "2*(6x4,4x6)+2*(3x8,8x3)+diag", "3*(2x2,12x12)"]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1e-30), (torch.float32, 1.0)])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
def test_a_step_never_loses_and_many_reach_the_svd(shape, dtype, scale):
    matrix = (gaussian(*shape) * scale).to(dtype)
    vectors = [torch.linalg.qr(gaussian(n, 5, seed=n))[0] for n in shape]
    found = VectorSum(torch.full((5,), scale, dtype=torch.float64), vectors).to(dtype)
    lost = float("inf")
    for _ in range(200):
        found = follow(matrix, found)
        before, lost = lost, float((matrix - found.dense()).square().sum())
        assert lost <= before * (1 + 1e-6)
    matrix = matrix.double()
    best = float((matrix - truncated_svd(matrix, 5).dense()).square().sum())
    assert best * (1 - 1e-6) <= lost <= best * (1 + 1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_a_fit_of_a_search_is_a_close_bound_from_below(spec):
    w, structure = gaussian(24, 24), parse(spec).resolve(24, 24)
    approximate = StructureSearch(w, Frobenius()).energy(structure)
    thorough = fit_with(Frobenius(), w, structure).energy
    assert 0.9 * thorough <= approximate <= thorough + 1e-6


def test_a_whole_matrix_is_fitted_exactly_and_what_is_left_of_an_exact_fit_too():
    w = gaussian(24, 24)
    for term in (term for spec in SPECS for term in parse(spec).resolve(24, 24).terms):
        exact = Frobenius().term(w, term, None, 0)
        torch.testing.assert_close(
            SubspaceFrobenius(w).term(w, term, None, 0).dense(), exact.dense(), atol=1e-9, rtol=0
        )
    planted = torch.kron(gaussian(4, 6), gaussian(6, 4, seed=1))
    approximate = SubspaceFrobenius(planted)
    (term,) = parse("2*(4x6,6x4)").resolve(24, 24).terms
    rest = planted + 0.1 * w
    torch.testing.assert_close(
        approximate.term(rest, term, None, 0).dense(), Frobenius().term(rest, term, None, 0).dense()
    )


def test_freeing_changes_nothing_but_the_memory():
    w = gaussian(24, 24)
    search, other = StructureSearch(w, Frobenius()), StructureSearch(w, Frobenius())
    search.candidates(200)
    search.free()
    assert not search.subspace.spectra
    assert [(c.structure, c.energy) for c in search.candidates(150)] == [
        (c.structure, c.energy) for c in other.candidates(150)
    ]


@pytest.mark.parametrize("kind", ["gaussian", "low rank", "kronecker"])
def test_the_bound_on_the_energy_of_a_shape_holds(kind):
    w = gaussian(24, 24)
    if kind == "low rank":
        w = gaussian(24, 2, seed=1) @ gaussian(2, 24, seed=2) + 0.1 * w
    if kind == "kronecker":
        w = torch.kron(gaussian(4, 6, seed=1), gaussian(6, 4, seed=2)) + 0.1 * w
    search = SubspaceFrobenius(w)
    for shapes in two_factor_shapes(24, 24):
        for rank in (1, 3, min(p * q for p, q in shapes)):
            singular = torch.linalg.svdvals(rearrange(w, shapes))[:rank]
            assert search.bound(shapes, rank) >= float(singular.square().sum()) * (1 - 1e-9)


@pytest.mark.parametrize("spec", SPECS)
def test_a_weighted_search_is_a_bound_from_below_too(spec):
    w, h = gaussian(24, 24), gaussian(60, 24, seed=1) * torch.logspace(0, -1, 24, dtype=torch.float64)
    structure, metric = parse(spec).resolve(24, 24), Weighted(h.T @ h / 60)
    total = metric.error(w)
    approximate, thorough = (
        1 - metric.error(w - fit_with(m, w, structure, sweeps=s).to_dense()) / total
        for m, s in ((metric.for_search(), 2), (metric, 30))
    )
    assert 0.9 * thorough <= approximate <= thorough + 1e-6


@pytest.mark.parametrize("together", [1, 1 << 24])
def test_the_values_of_a_sparse_residual_are_the_least_squares_ones(together, monkeypatch):
    monkeypatch.setattr(weighted, "SYSTEMS", together)
    w, h = gaussian(16, 12), gaussian(40, 12, seed=1)
    metric = Weighted(h.T @ h / 40)
    values, index = metric.sparse_residual(w, 17, 4, None)
    assert len(index.unique(dim=0)) == 17
    for row in range(16):  # each row by itself: min ||(w - k) root|| over the entries that it has
        columns = [int(c) for r, c in index.tolist() if r <= row < r + 4]
        if columns:
            wanted = torch.linalg.lstsq(metric.root[columns].T, metric.root @ w[row]).solution
            got = torch.stack(
                [v[row - r] for v, (r, _) in zip(values, index.tolist(), strict=True) if r <= row < r + 4]
            )
            torch.testing.assert_close(got, wanted)
    assert metric.sparse_residual(w, 0, 4, None)[0].shape == (0, 4)


def test_the_heaviest_places_are_those_of_a_stable_sort():
    for seed in range(20):
        weight = torch.randint(4, (5, 7), generator=torch.Generator().manual_seed(seed)).double()
        for blocks in (0, 1, 5, 17, 35):
            places = weight.reshape(-1).argsort(descending=True, stable=True)[:blocks].sort().values
            assert torch.equal(heaviest(weight, blocks), torch.stack([places // 7, places % 7], dim=1))
