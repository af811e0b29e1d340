from __future__ import annotations

import numpy as np
import pytest
import torch

from kruify.decomposition import null_energy
from kruify.decomposition.random_matrix import gaussian_energy
from kruify.decomposition.svd import truncated_svd
from kruify.factors import parse


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(m, n, rank):
    return gaussian(m, rank) @ gaussian(rank, n, seed=1)


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [
        (gaussian(800, 800), 3),  # Lanczos, the hardest spectrum
        (gaussian(800, 1000), 4),
        (gaussian(1000, 800), 40),  # Gram matrix
        (gaussian(1000, 800), 1),
        (low_rank(800, 800, 4), 4),  # Lanczos breaks down: exact after four steps
        (low_rank(800, 800, 3), 4),  # fewer than asked for
        (torch.eye(800, dtype=torch.float64), 3),  # one start vector sees one direction only
        (torch.block_diag(2 * torch.eye(2, dtype=torch.float64), 0.01 * gaussian(800, 800)), 1),
        (torch.zeros(800, 800, dtype=torch.float64), 2),
        (gaussian(60, 100), 7),  # Gram matrix
        (gaussian(100, 60), 50),  # LAPACK
        (gaussian(40, 40) * torch.logspace(0, -12, 40, dtype=torch.float64), 5),  # too steep for the Gram matrix
    ],
)
def test_truncated_svd_equals_numpys_full_one(matrix, rank):
    found = truncated_svd(matrix, rank)
    left, weight, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    tail = np.linalg.norm(weight[rank:])
    np.testing.assert_allclose(found.weight, weight[: found.rank], rtol=1e-11, atol=1e-11 * weight[0])
    assert float((matrix - found.dense()).norm()) == pytest.approx(tail, rel=1e-9, abs=1e-11 * (1 + weight[0]))
    if rank < len(weight) and weight[rank - 1] > 1.0001 * weight[rank]:
        best = (left[:, :rank] * weight[:rank]) @ right[:rank]
        assert np.linalg.norm(found.dense().numpy() - best) <= 1e-8 * np.linalg.norm(best)
    for vectors in found.vectors:
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(found.rank, dtype=torch.float64))


@pytest.mark.parametrize(("m", "n", "rank"), [(200, 200, 1), (200, 200, 20), (100, 900, 5), (900, 100, 60)])
def test_the_null_level_by_theory_is_what_a_gaussian_matrix_keeps(m, n, rank):
    values = np.linalg.svd(gaussian(m, n).numpy(), compute_uv=False) ** 2
    assert gaussian_energy(m, n, rank) == pytest.approx(values[:rank].sum() / values.sum(), rel=0.05)
    assert gaussian_energy(m, n, min(m, n)) == 1


def test_the_two_ways_to_the_null_level_agree():
    structure = parse("2*(32x32,32x32)").resolve(1024, 1024)
    assert null_energy(structure) == pytest.approx(gaussian_energy(1024, 1024, 2), rel=0.02)
