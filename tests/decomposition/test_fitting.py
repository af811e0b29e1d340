from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kruify.decomposition import fit, null_energy
from kruify.errors import KruifyError, UnsupportedError, UsageError
from kruify.factors import Structure, Term, parse
from kruify.layers.assign import assign
from kruify.layers.matrix import KroneckerMatrix


def gaussian(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle_rearranged(w, p0, q0, p1, q1):
    """Van Loan & Pitsianis by their definition: row (i, j) is vec of the block W_ij."""
    w = np.asarray(w)
    return np.stack([w[i * p1 : (i + 1) * p1, j * q1 : (j + 1) * q1].reshape(-1) for i in range(p0) for j in range(q0)])


def dense(f):
    """What a fit stands for, by numpy's kron and loops alone."""
    w = np.zeros((f.structure.rows, f.structure.cols))
    for scale, factors in f.terms:
        for r in range(len(scale)):
            product = np.ones((1, 1))
            for factor in factors:
                product = np.kron(product, factor[r].numpy())
            w += float(scale[r]) * product
    if f.diagonal is not None:
        for i, d in enumerate(f.diagonal.tolist()):
            w[i, i] += d
    if f.sparse_residual is not None:
        for values, (row, col) in zip(f.sparse_residual[0].tolist(), f.sparse_residual[1].tolist(), strict=True):
            for offset, value in enumerate(values):
                w[row + offset, col] += value
    return w


sizes = st.integers(1, 4)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, sizes, st.integers(1, 6), st.integers(0, 99))
def test_two_factors_reach_the_eckart_young_tail(p0, q0, p1, q1, rank, seed):
    w = gaussian(p0 * p1, q0 * q1, seed)
    f = fit(w, Structure(p0 * p1, q0 * q1, (Term(((p0, q0), (p1, q1)), rank),)))
    tail = np.linalg.svd(oracle_rearranged(w, p0, q0, p1, q1), compute_uv=False)[rank:]
    error = np.linalg.norm(w.numpy() - dense(f))
    assert error == pytest.approx(np.linalg.norm(tail), abs=1e-10)
    assert f.relative_error == pytest.approx(error / np.linalg.norm(w), abs=1e-10)
    assert f.energy == pytest.approx(1 - (error / np.linalg.norm(w)) ** 2, abs=1e-10)


ALL_TERMS = [
    ("18*(3x2,4x9)", 12, 18),
    ("36*(3x2,2x3,2x3)", 12, 18),
    ("216*(3x2,2x3,2x3)+diag", 12, 18),
    ("12*(12x1,1x18)", 12, 18),
    ("12x18", 12, 18),
    ("2*(12x18)", 12, 18),
    ("sparse:100%:4", 12, 18),
    ("64*2x2", 8, 8),
    ("257x257", 257, 257),
]


@pytest.mark.parametrize(("spec", "rows", "cols"), ALL_TERMS)
@pytest.mark.parametrize("scaled", [False, True])
def test_all_terms_reproduce_the_matrix_through_assign(spec, rows, cols, scaled):
    structure = replace(parse(spec).resolve(rows, cols), scaled=scaled)
    gates = [gaussian(rows, cols, seed) for seed in range(2)]
    fits = [fit(w, structure) for w in gates]
    module = KroneckerMatrix([structure] * 2, dtype=torch.float64)
    assign(module, fits)
    wanted = torch.cat(gates)
    assert float((module.to_dense().detach() - wanted).norm() / wanted.norm()) < 1e-12
    assert all(f.energy == pytest.approx(1) for f in fits)


def test_the_null_level_of_an_unstructured_matrix_is_its_own_energy():
    structure = parse("4*(16x16,16x16)").resolve(256, 256)
    energy = fit(gaussian(256, 256, seed=1), structure).energy
    assert null_energy(structure) == pytest.approx(energy, rel=0.05)


def test_the_input_is_not_touched():
    for spec in ("diag", "sparse:10%", "2*(4x4,4x4)+diag+sparse:5%", "4x4"):
        w = gaussian(16, 16)
        kept = w.clone()
        fit(w, parse(spec).resolve(16, 16))
        assert torch.equal(w, kept), spec


def test_diagonal_and_overlay_alone_are_what_they_say():
    w = gaussian(16, 8)
    f = fit(w, parse("diag").resolve(16, 8))
    assert torch.equal(f.diagonal, w.diagonal())
    f = fit(w, parse("sparse:25%:4").resolve(16, 8))
    heaviest = w.reshape(4, 4, 8).square().sum(1).flatten().sort(descending=True).values[:8].sum()
    assert f.energy == pytest.approx(float(heaviest / w.square().sum()))
    assert f.sparse_residual[1].tolist() == sorted(f.sparse_residual[1].tolist())
    np.testing.assert_allclose(dense(f), f.to_dense().numpy())


def test_gates_of_different_structures_land_in_their_own_places():
    specs = ["2*(4x4,4x2)+sparse:10%:4+diag", "16x1,1x8", "2*(4x4,4x2)+2*(4x4,4x2)+sparse:20%:4"]
    structures = [parse(s).resolve(16, 8) for s in specs]
    fits = [fit(gaussian(16, 8, i), s) for i, s in enumerate(structures)]
    module = KroneckerMatrix(structures, dtype=torch.float64)
    assign(module, fits)
    np.testing.assert_allclose(module.to_dense().detach().numpy(), np.concatenate([dense(f) for f in fits]), atol=1e-12)
    index = module.overlay.index.tolist()
    assert index == sorted(index)
    with pytest.raises(UsageError):
        assign(module, fits[::-1])


def test_norms_are_balanced():
    structure = parse("3*(4x4,2x8,8x2)").resolve(64, 64)
    scale, factors = fit(gaussian(64, 64), structure).terms[0]
    assert (scale > 0).all()
    for factor in factors:
        expected = math.sqrt(min(factor.shape[1:]))
        torch.testing.assert_close(factor.flatten(1).norm(dim=1), torch.full((3,), expected, dtype=torch.float64))


def test_more_terms_than_the_matrix_needs_stay_trainable():
    structure = parse("3*(4x4,4x4)").resolve(16, 16)
    w = torch.kron(gaussian(4, 4, 1), gaussian(4, 4, 2))
    f = fit(w, structure)
    module = KroneckerMatrix([structure], dtype=torch.float64)
    assign(module, [f])
    assert f.relative_error < 1e-12
    module.to_dense().square().sum().backward()
    first = module.term_list()[0].factors[0]
    assert float(first[0, 2].detach().abs().max()) < 1e-7
    assert (first.grad[0].flatten(1).norm(dim=1) > 0).all()


def test_a_zero_matrix_is_fitted_by_zero():
    f = fit(torch.zeros(16, 16), parse("2*(4x4,4x4)+2*(2x2)+diag+sparse:10%").resolve(16, 16))
    assert (f.energy, f.relative_error) == (1.0, 0.0)
    assert float(f.to_dense().abs().max()) == 0


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (torch.full((16, 16), float("nan")), UnsupportedError),
        (torch.full((16, 16), float("inf")), UnsupportedError),
        (torch.zeros(16, 8), UsageError),
        (torch.zeros(0, 16), UsageError),
        (torch.zeros(16), UsageError),
        (torch.zeros(16, 16, dtype=torch.int64), UsageError),
        (torch.zeros(16, 16, dtype=torch.complex64), UsageError),
    ],
)
def test_bad_matrices_are_named(matrix, error):
    structure = parse("4x4").resolve(16, 16)
    with pytest.raises(error) as caught:
        fit(matrix, structure)
    assert isinstance(caught.value, KruifyError) and "\n" not in str(caught.value)


def test_a_covariance_of_another_size_is_named():
    with pytest.raises(UsageError, match="16x16"):
        fit(gaussian(16, 16), parse("4x4").resolve(16, 16), covariance=torch.eye(8))
