from __future__ import annotations

import numpy as np
import pytest
import torch

from kruify.decomposition import fit
from kruify.decomposition.weighted import Weighted, best_factor
from kruify.errors import UnsupportedError, UsageError
from kruify.factors import parse


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(n, decay=3.0):
    basis = torch.linalg.qr(gaussian(n, n, seed=7))[0]
    return (basis * torch.logspace(0, -decay, n, dtype=torch.float64)) @ basis.T


def output_error(w, k, c):
    e = (w - k).numpy()
    return float(np.trace(e @ c.numpy() @ e.T))


STRUCTURES = [
    "2*(4x4,6x4)",
    "3*(24x1,1x16)",
    "2*(2x2,3x4,4x2)",
    "2*(4x4,6x4)+2*(24x1,1x16)",
    "2*(24x1,1x16)+diag+sparse:10%:4",
    "sparse:20%:4",
    "diag",
    "2*(24x2,1x8)",
]


@pytest.mark.parametrize("spec", STRUCTURES)
def test_the_weighted_fit_loses_less_of_the_output_than_the_plain_one(spec):
    w, c = gaussian(24, 16), covariance(16)
    structure = parse(spec).resolve(24, 16)
    plain, weighted = fit(w, structure), fit(w, structure, covariance=c)
    ours, theirs = output_error(w, weighted.to_dense(), c), output_error(w, plain.to_dense(), c)
    assert ours < theirs
    total = output_error(w, torch.zeros_like(w), c)
    assert weighted.energy_weighted == pytest.approx(1 - ours / total)
    assert np.isnan(plain.energy_weighted)
    assert weighted.relative_error == pytest.approx(float((w - weighted.to_dense()).norm() / w.norm()))


def test_low_rank_reaches_the_optimum_of_the_whitened_matrix():
    w, c = gaussian(24, 16), covariance(16, decay=1.0)
    found = fit(w, parse("3*(24x1,1x16)").resolve(24, 16), covariance=c)
    root = np.linalg.cholesky(c.numpy())
    tail = np.linalg.svd(w.numpy() @ root, compute_uv=False)[3:]
    assert output_error(w, found.to_dense(), c) == pytest.approx((tail**2).sum(), rel=1e-4)


def test_no_factor_can_be_improved_alone():
    w, c, structure = gaussian(24, 16), covariance(16, decay=1.0), parse("2*(4x4,6x4)").resolve(24, 16)
    scale, factors = fit(w, structure, covariance=c).terms[0]
    variables = [(factors[0] * scale[:, None, None]).requires_grad_(), factors[1].clone().requires_grad_()]
    k = sum(torch.kron(variables[0][r].contiguous(), variables[1][r].contiguous()) for r in range(2))
    error = ((w - k) @ c * (w - k)).sum()
    for gradient, variable in zip(torch.autograd.grad(error, variables), variables, strict=True):
        assert float(gradient.norm() * variable.detach().norm()) < 0.02 * float(error.detach())


def test_an_identity_covariance_changes_nothing():
    w, structure = gaussian(24, 16), parse("2*(4x4,6x4)").resolve(24, 16)
    weighted = fit(w, structure, covariance=torch.eye(16))
    assert weighted.energy == pytest.approx(fit(w, structure).energy, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_covariance_of_low_rank_or_zero_still_fits(rank):
    h = gaussian(rank, 16)
    w = gaussian(24, 16)
    for c in (h.T @ h, torch.zeros(16, 16)):
        for spec in ("2*(4x4,6x4)", "4*(24x1,1x16)", "2*(24x1,1x16)+sparse:10%"):
            found = fit(w, parse(spec).resolve(24, 16), covariance=c)
            assert bool(torch.isfinite(found.to_dense()).all())
    exact = fit(w, parse("4*(24x1,1x16)").resolve(24, 16), covariance=h.T @ h)
    assert exact.energy_weighted > 1 - 1e-6  # as many terms as directions that ever occur


def test_both_ways_to_the_normal_equations_agree():
    w, metric = gaussian(64, 64), Weighted(covariance(64))
    shapes = ((2, 2), (32, 32))
    one = [gaussian(12, *s, seed=i) for i, s in enumerate(shapes)]
    for f in (0, 1):  # the first takes the one way, the second the other
        solved, taken = best_factor(w @ metric.c, metric.c, shapes, one, f)
        k = sum(torch.kron(*[(solved if g == f else one[g])[r].contiguous() for g in (0, 1)]) for r in range(12))
        rest = w - k
        left = float(((rest @ metric.c) * rest).sum())
        assert left == pytest.approx(float(((w @ metric.c) * w).sum()) - taken, rel=1e-6)


@pytest.mark.parametrize(
    ("c", "error"),
    [
        (torch.full((16, 16), float("nan")), UnsupportedError),
        (-torch.eye(16), UsageError),
        (gaussian(16, 16), UsageError),
        (torch.eye(4), UsageError),
    ],
)
def test_bad_covariances_are_named(c, error):
    with pytest.raises(error, match="covariance"):
        fit(gaussian(24, 16), parse("4x4,6x4").resolve(24, 16), covariance=c)
