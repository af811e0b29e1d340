"""Conditioning of matrices against numpy's, worked out from the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kruify.analysis.conditioning import conditioning
from kruify.factors import parse
from kruify.layers.matrix import KroneckerMatrix, exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_measures_follow_from_the_definition(dtype: torch.dtype) -> None:
    matrix = torch.randn(6, 6, dtype=dtype)
    found = conditioning(matrix)
    w = matrix.numpy()
    assert found.condition_number == pytest.approx(np.linalg.cond(w, 2))
    assert found.spectral_norm == pytest.approx(np.linalg.norm(w, 2))
    defect = np.linalg.norm(w.conj().T @ w - np.eye(6)) / np.sqrt(6)
    assert found.unitarity_defect == pytest.approx(defect)
    assert list(found.singular_values) == pytest.approx(list(np.linalg.svd(w, compute_uv=False)))


def test_unitary_singular_and_broken() -> None:
    q = torch.linalg.qr(torch.randn(5, 5, dtype=torch.complex128)).Q
    assert conditioning(q).condition_number == pytest.approx(1)
    assert conditioning(q).unitarity_defect == pytest.approx(0, abs=1e-12)
    assert conditioning(torch.ones(4, 4, dtype=torch.float64)).condition_number == float("inf")
    assert np.isnan(conditioning(torch.full((3, 3), float("nan"), dtype=torch.float64)).condition_number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_exact_multiplies_in_double_precision(dtype: torch.dtype) -> None:
    matrix = KroneckerMatrix([parse("2x2").resolve(8, 8)], dtype=dtype)
    factors = [f.detach()[0, 0].numpy() for f in matrix.term_list()[0].factors]
    wide = np.complex128 if dtype.is_complex else np.float64
    expected = np.kron(np.kron(factors[0].astype(wide), factors[1].astype(wide)), factors[2].astype(wide))
    found = exact(matrix)
    assert found.dtype == (torch.complex128 if dtype.is_complex else torch.float64)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-15)
    assert matrix.dtype == dtype
    dense = torch.randn(3, 3)
    assert torch.equal(exact(dense), dense.double())
