"""KroneckerMatrix: names, counts, and the product against an independent dense sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kruify.errors import UsageError
from kruify.factors import parse
from kruify.layers import KroneckerMatrix

SPECS = ("2*(4x4,2x2)", "2x2", "8x1,1x8", "diag", "2*(4x4,2x2)+diag", "2x2+sparse:20%:2", "sparse:10%:2", "2x4,4x2")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(SPECS), min_size=1, max_size=4), st.integers(0, 2**31))
def test_product_is_that_of_the_dense_sum(specs: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    structures = [parse(s).resolve(8, 8) for s in specs]
    matrix = KroneckerMatrix(structures, dtype=torch.float64)
    with torch.no_grad():
        for parameter in matrix.parameters():
            parameter.normal_()
    dense = torch.zeros(8 * len(specs), 8, dtype=torch.float64)
    for term in matrix.term_list():
        for i, gate in enumerate(term.gates):
            for r in range(term.term.rank):
                product = torch.ones(1, 1, dtype=torch.float64)
                for factor in term.factors:
                    product = torch.kron(product, factor[i, r])
                dense[8 * gate : 8 * gate + 8] += product
    if matrix.diagonal is not None:
        for i, gate in enumerate(matrix.diagonal_gates):
            dense[8 * gate : 8 * gate + 8] += torch.diag(matrix.diagonal[i])
    if matrix.overlay is not None:
        for (row, col), block in zip(matrix.overlay.index.tolist(), matrix.overlay.values, strict=True):
            dense[row : row + 2, col] += block
    torch.testing.assert_close(matrix.to_dense(), dense)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(matrix(x), x @ dense.T)
    assert sum(p.numel() for p in matrix.parameters()) == sum(s.parameters for s in structures)


def test_equal_terms_are_stacked_and_named_as_documented() -> None:
    matrix = KroneckerMatrix([parse("2*(4x4,2x2)+diag+sparse:20%:2").resolve(8, 8)] * 3)
    assert list(matrix.state_dict()) == [
        "diagonal", "terms.0.factors.0", "terms.0.factors.1", "overlay.values", "overlay.index",
    ]  # fmt: skip
    assert matrix.terms[0].factors[0].shape == (3, 2, 4, 4)


def test_random_start_is_orthogonal() -> None:
    dense = KroneckerMatrix([parse("2x2").resolve(16, 16)], dtype=torch.float64).to_dense()
    torch.testing.assert_close(dense @ dense.T, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("specs", [("2x2+sparse:20%:2", "2x2+sparse:20%:4")])
def test_one_block_height_a_matrix(specs: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="one block height"):
        KroneckerMatrix([parse(s).resolve(8, 8) for s in specs])
