from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kruify.decomposition import fit
from kruify.decomposition.als import by_shared_contractions, by_tensorly, refine
from kruify.decomposition.nearest_sum import nearest
from kruify.decomposition.rearrangement import rearrange, restore
from kruify.decomposition.successive import higher_order_svd, successive_svd
from kruify.factors import Structure, Term, parse

SHAPES = [(2, 3), (3, 2), (4, 1), (2, 2), (1, 3), (3, 3)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kron(factors):
    w = np.ones((1, 1))
    for f in factors:
        w = np.kron(w, f.numpy())
    return torch.from_numpy(w)


def distance(tensor, found):
    return float((tensor - found.dense()).norm())


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_planted_products_are_recovered(count):
    shapes = SHAPES[:count]
    planted = [gaussian(*s, seed=i) for i, s in enumerate(shapes)]
    w = kron(planted)
    f = fit(w, Structure(*w.shape, (Term(tuple(shapes)),)))
    assert f.relative_error < 1e-10
    scale, factors = f.terms[0]
    assert scale.shape == (1,)
    for p, factor in zip(planted, factors, strict=True):
        unit, found = p / p.norm(), factor[0] / factor[0].norm()
        sign = torch.sign((unit * found).sum())
        assert float((unit - sign * found).norm()) < 1e-8


@pytest.mark.parametrize("rank", [1, 3])
def test_rearranging_lays_products_out_as_outer_products_and_back(rank):
    factors = [gaussian(*s, seed=i) for i, s in enumerate(SHAPES[:4])]
    w = kron(factors)
    tensor = rearrange(w, SHAPES[:4])
    outer = np.einsum("a,b,c,d->abcd", *(f.reshape(-1).numpy() for f in factors))
    np.testing.assert_allclose(tensor.numpy(), outer)
    assert torch.equal(restore(tensor, SHAPES[:4]), w)


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 4), st.integers(1, 4), st.integers(0, 99))
def test_never_worse_than_its_starts(count, rank, seed):
    tensor = gaussian(*[math.prod(s) for s in SHAPES[:count]], seed=seed)
    found = distance(tensor, nearest(tensor, rank, seed=seed))
    for start in (successive_svd(tensor, rank), higher_order_svd(tensor, rank)):
        assert found <= distance(tensor, start) * (1 + 1e-12)


@pytest.mark.parametrize("sizes", [(4, 5, 6, 3), (2, 3, 2, 3, 2, 2, 3)])
def test_each_sweep_descends(sizes):
    tensor, start = gaussian(*sizes), successive_svd(gaussian(*sizes), 3)
    errors = [distance(tensor, refine(tensor, start, sweeps=n, tolerance=0)) for n in range(8)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("sizes", [(6, 8, 4), (3, 4, 2, 3, 2, 3)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_both_ways_to_descend_keep_the_same_energy(rank, sizes):
    tensor = gaussian(*sizes, seed=rank)
    start = successive_svd(tensor, rank)
    vectors = [v * start.weight ** (1 / len(sizes)) for v in start.vectors]
    one, other = (way(tensor, vectors, 500, 1e-12) for way in (by_tensorly, by_shared_contractions))
    assert one.distance(tensor) == pytest.approx(other.distance(tensor), rel=1e-6)
    assert one.distance(tensor) < start.distance(tensor)


def test_the_users_backend_of_tensorly_stays():
    tensorly = pytest.importorskip("tensorly")
    before = tensorly.get_backend()
    refine(gaussian(4, 5, 6), successive_svd(gaussian(4, 5, 6), 2))
    assert tensorly.get_backend() == before


def test_planted_product_in_noise_is_found_at_the_planted_error():
    shapes = [(4, 4)] * 4
    product = kron([gaussian(4, 4, seed=i) for i in range(4)])
    noise = gaussian(256, 256, seed=9)
    w = product / product.norm() + 0.5 * noise / noise.norm()
    f = fit(w, Structure(256, 256, (Term(tuple(shapes)),)))
    planted = 0.5 / float(w.norm())
    assert 0.999 * planted < f.relative_error <= planted


@settings(max_examples=12, deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(0, 50), st.sampled_from([2, 3]))
def test_scale_and_transpose_invariance(scale, seed, count):
    shapes = SHAPES[:count]
    w = gaussian(math.prod(p for p, _ in shapes), math.prod(q for _, q in shapes), seed=seed)
    structure = Structure(*w.shape, (Term(tuple(shapes), 2),))
    turned = Structure(w.shape[1], w.shape[0], (Term(tuple((q, p) for p, q in shapes), 2),))
    error = fit(w, structure).relative_error
    assert fit(scale * w, structure).relative_error == pytest.approx(error, abs=1e-6)
    if count == 2:  # more factors: the starts break ties of the transposed problem differently
        assert fit(w.T, turned).relative_error == pytest.approx(error, abs=1e-10)


def test_the_heaviest_of_all_orthogonal_products_come_first():
    tensor = gaussian(3, 4, 5)
    every = successive_svd(tensor, 60)
    assert distance(tensor, every) < 1e-12
    few = successive_svd(tensor, 5)
    torch.testing.assert_close(few.weight, every.weight.sort(descending=True).values[:5])
    complete = higher_order_svd(tensor, 60)
    assert distance(tensor, complete) < 1e-12


@pytest.mark.parametrize("spec", ["2x3,3x2,2x2", "2*(2x3,3x2,2x2)", "3x2,1x4,4x1,2x2"])
def test_transposing_the_matrix_transposes_the_fit(spec):
    """Three factors and more, on noise alone and on noise around a product: the same energy.

    On noise without the random starts: they are seeded alike, so those of the transposed matrix are not transposed.
    """
    structure = parse(spec).resolve(*shape_of(spec))
    (term,) = structure.terms
    turned = Structure(structure.cols, structure.rows, (Term(tuple((q, p) for p, q in term.factors), term.rank),))
    for seed in range(4):
        w = gaussian(structure.rows, structure.cols, seed=seed)
        tensors = rearrange(w, term.factors), rearrange(w.T, turned.terms[0].factors)
        one, other = (nearest(t, term.rank, restarts=0) for t in tensors)
        lost = [float((t - found.dense()).square().sum()) for t, found in zip(tensors, (one, other), strict=True)]
        assert lost[0] == pytest.approx(lost[1], rel=1e-6)
        product = torch.ones(1, 1, dtype=torch.float64)
        for f, (p, q) in enumerate(term.factors):
            product = torch.kron(product, gaussian(p, q, seed=10 * seed + f))
        w = product / product.norm() + 0.1 * w / w.norm()
        a, b = fit(w, structure), fit(w.T, turned)
        assert a.energy == pytest.approx(b.energy, abs=1e-6)
        if term.rank == 1:
            torch.testing.assert_close(a.to_dense().T, b.to_dense(), atol=1e-4, rtol=0)


def shape_of(spec):
    pairs = [tuple(map(int, part.split("x"))) for part in re.findall(r"\d+x\d+", spec)]
    return math.prod(p for p, _ in pairs), math.prod(q for _, q in pairs)
