"""The operator against numpy's kron."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kruify import kronecker

shapes = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5)


def oracle(factors: list[torch.Tensor], scale: torch.Tensor) -> np.ndarray:
    """(gates, rows, cols), by numpy alone."""
    gates, rank = scale.shape
    return np.stack(
        [
            sum(
                scale[g, r].item() * reduce(np.kron, [f[g, r].numpy() for f in factors], np.ones((1, 1)))
                for r in range(rank)
            )
            for g in range(gates)
        ]
    )


@settings(deadline=None)
@given(shapes, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_dense_and_matmul(factor_shapes: list[tuple[int, int]], gates: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = [normal(gates, rank, p, q) for p, q in factor_shapes]
    scale = normal(gates, rank)
    dense = oracle(factors, scale)
    np.testing.assert_allclose(kronecker.to_dense(factors, scale).numpy(), dense, atol=1e-12)
    x = normal(2, 3, dense.shape[-1])
    expected = np.einsum("gmn,abn->abgm", dense, x.numpy())
    np.testing.assert_allclose(kronecker.matmul(x, factors, scale).numpy(), expected, atol=1e-11)
    unscaled = oracle(factors, torch.ones_like(scale))
    np.testing.assert_allclose(kronecker.to_dense(factors).numpy(), unscaled, atol=1e-12)
    np.testing.assert_allclose(
        kronecker.matmul(x, factors).numpy(), np.einsum("gmn,abn->abgm", unscaled, x.numpy()), atol=1e-11
    )


@pytest.mark.parametrize("function", ["to_dense", "matmul"])
def test_gradcheck(function: str) -> None:
    factors = [torch.randn(2, 2, p, q, dtype=torch.float64, requires_grad=True) for p, q in ((2, 3), (3, 2), (2, 2))]
    scale = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    if function == "to_dense":
        assert torch.autograd.gradcheck(lambda s, *f: kronecker.to_dense(f, s), (scale, *factors))
    else:
        assert torch.autograd.gradcheck(lambda x, s, *f: kronecker.matmul(x, f, s), (x, scale, *factors))
