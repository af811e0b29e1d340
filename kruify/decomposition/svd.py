"""The heaviest singular triplets of a matrix: LAPACK for small ones, Lanczos for large ones.

scipy is imported where it is called: with it `import kruify.api` takes twice as long.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kruify.decomposition.vectors import NUMERICALLY_ZERO, VectorSum, normalised

LANCZOS_FROM = 768  # shorter side from which Lanczos wins over LAPACK for a few triplets,
LANCZOS_FEW = 4  # ... that is, so many,
LANCZOS_LARGE = 2048  # and the shorter side from which it also wins for
LANCZOS_SHARE = 16  # ... 1/16 of all
GRAM_SHARE = 8  # elsewhere, at most 1/8 of all triplets come from the Gram matrix
PANEL = 16  # rows that stay in the cache between the two products with them
BASIS = 40  # fewest Lanczos vectors between two restarts
KRYLOV = 2  # products with M M^T: with one, sums end 2e-4 of their energy lower
ACCURACY = 1e-13  # of the squared singular values, relative


def truncated_svd(matrix: Tensor, rank: int) -> VectorSum:
    """The `rank` heaviest singular triplets of a float64 (m, n) matrix; fewer where its rank is lower."""
    shorter = min(matrix.shape)
    few = shorter >= LANCZOS_FROM and rank <= LANCZOS_FEW
    if few or (shorter >= LANCZOS_LARGE and rank * LANCZOS_SHARE <= shorter):
        found = _lanczos(matrix, rank)
        if found is not None:
            return found
    elif rank * GRAM_SHARE <= shorter:
        found = _by_gram(matrix, rank)
        if found is not None:
            return found
    left, weight, right = torch.linalg.svd(matrix, full_matrices=False)
    keep = min(rank, int((weight > NUMERICALLY_ZERO * weight[0]).sum()))
    return VectorSum(weight[:keep], [left[:, :keep], right[:keep].T])


def _gram(matrix: Tensor, x: Tensor) -> Tensor:
    """M^T M x in one pass over the memory of M: a panel of rows is still cached when its transpose is applied."""
    if not matrix.is_contiguous():
        return matrix.T @ (matrix @ x)
    y = torch.zeros_like(x)
    for panel in torch.split(matrix, PANEL):
        y.addmv_(panel.T, panel @ x)
    return y


def _by_gram(matrix: Tensor, rank: int) -> VectorSum | None:
    """The triplets through the smaller Gram matrix, several times faster than LAPACK's SVD of all; None where that
    would cost accuracy: triplets far lighter than the heaviest."""
    import scipy.linalg

    work = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    n = work.shape[1]
    values, vectors = scipy.linalg.eigh((work.T @ work).numpy(), subset_by_index=[n - rank, n - 1], check_finite=False)
    if values[0] <= 1e-6 * values[-1] or values[-1] <= 0:
        return None
    left, weight, right = _exact_triplets(work, torch.from_numpy(vectors[:, ::-1].copy()))
    return VectorSum(weight, [left, right] if work is matrix else [right, left])


def _exact_triplets(work: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal right vectors of a good subspace -> the triplets of M V V^T, exact for that projection."""
    left, weight, turn = torch.linalg.svd(work @ right, full_matrices=False)
    return left, weight, right @ turn.T


def _lanczos(matrix: Tensor, rank: int) -> VectorSum | None:
    """The triplets by ARPACK's Lanczos iteration on M^T M; None where it does not converge.

    Working with the Gram matrix squares the condition, which harms only triplets lighter than 1e-7 of the heaviest;
    those are left to LAPACK.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    work = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    n = work.shape[1]
    operator = LinearOperator((n, n), lambda x: _gram(work, torch.from_numpy(x)).numpy(), dtype=np.float64)
    start = torch.randn(n, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)).numpy()
    try:
        values, vectors = eigsh(operator, rank, which="LA", v0=start, ncv=max(2 * rank + 1, BASIS), tol=ACCURACY)
    except ArpackError:
        return None
    if values[0] <= 1e-14 * values[-1]:
        return None
    left, weight, right = _exact_triplets(work, torch.from_numpy(vectors[:, ::-1].copy()))
    return VectorSum(weight, [left, right] if work is matrix else [right, left])


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric (n, n) matrix."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    except RuntimeError:  # LAPACK's divide and conquer gives up where many eigenvalues are equal; QR does not
        import scipy.linalg

        found = scipy.linalg.eigh(matrix.numpy(force=True), driver="ev")
        values, vectors = (torch.from_numpy(array).to(matrix) for array in found)
        return values, vectors


def eigvalsh(matrix: Tensor) -> Tensor:
    """The eigenvalues alone, in less time."""
    try:
        values: Tensor = torch.linalg.eigvalsh(matrix)
        return values
    except RuntimeError:  # as in eigh
        return eigh(matrix)[0]


def follow(matrix: Tensor, start: VectorSum) -> VectorSum:
    """One step of subspace iteration from a sum of products: never further from (m, n) `matrix`.

    The vectors on the shorter side of the result are orthonormal.
    """
    if start.rank == 0:  # of a matrix that is zero
        return start
    side = shorter_side(matrix)
    work = matrix if side == 0 else matrix.T
    image = start.vectors[1 - side] * (start.weight / start.weight.max().clamp(min=torch.finfo(matrix.dtype).tiny))
    basis = torch.linalg.qr(product(work, image))[0]
    image = product(work.T, basis)
    return normalised([basis, image] if side == 0 else [image, basis])


def improve(matrix: Tensor, start: VectorSum) -> VectorSum:
    """The best sum of as many products in a small block Krylov space of M M^T that holds `start`: never further from
    (m, n) `matrix`, and nearly its SVD where it is little changed (Musco & Musco 2015), in a fraction of the time."""
    rank, side = start.rank, shorter_side(matrix)
    if (KRYLOV + 1) * rank >= min(matrix.shape):
        return truncated_svd(matrix, rank)
    work = matrix if side == 0 else matrix.T
    basis, image = start.vectors[side], start.vectors[1 - side] * (start.weight > 0)
    blocks = [basis]
    for _ in range(KRYLOV):
        blocks.append(torch.linalg.qr(product(work, image))[0])
        image = product(work.T, blocks[-1])
    basis = torch.linalg.qr(torch.cat(blocks, dim=1))[0]
    other, weight, turn = torch.linalg.svd(product(work.T, basis), full_matrices=False)
    vectors = [basis @ turn[:rank].T, other[:, :rank]]
    return VectorSum(weight[:rank], vectors if side == 0 else vectors[::-1])


def product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """M V of few columns, as rows: BLAS may take ten times as long for a transposed M and the columns that QR gives."""
    return (vectors.T @ matrix.T).T


def shorter_side(matrix: Tensor) -> int:
    return 0 if matrix.shape[0] <= matrix.shape[1] else 1
