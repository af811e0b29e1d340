"""The heaviest singular triplets of a matrix: LAPACK for small ones, Lanczos for large ones."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from kruify.decomposition.vectors import NUMERICALLY_ZERO, VectorSum, normalised

LANCZOS_FROM = 768  # shorter side from which Lanczos wins over LAPACK for a few triplets,
LANCZOS_FEW = 4  # ... that is, so many,
LANCZOS_LARGE = 2048  # and the shorter side from which it also wins for
LANCZOS_SHARE = 16  # ... 1/16 of all
GRAM_SHARE = 8  # elsewhere, at most 1/8 of all triplets come from the Gram matrix
LANCZOS_LIMIT = 1200  # steps; beyond, the basis costs more than LAPACK
PANEL = 16  # rows that stay in the cache between the two products with them
ACCURACY = 2e-8  # estimated distance of the subspace found from the true one; the estimate is ten times too careful
SINGLE_FROM = 1 << 20  # entries from which `follow` multiplies in single precision
BACKWARD = 1e-13  # or: a residual at rounding level, where singular values lie too close to be told apart


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
    """Lanczos on M^T M with full reorthogonalisation; None where it does not converge or misses a multiple value.

    Golub & Van Loan, "Matrix Computations", section 10.1. Working with the Gram matrix squares the condition, which
    harms only triplets lighter than 1e-7 of the heaviest; those are left to LAPACK.
    """
    work = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    n = work.shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, dtype=matrix.dtype, generator=generator)
    limit = min(LANCZOS_LIMIT, n - 1)
    basis = torch.empty(limit + 1, n, dtype=matrix.dtype)
    basis[0] = start / start.norm()
    alpha: list[float] = []
    beta: list[float] = []
    values = vectors = torch.empty(0)
    for step in range(limit):
        image = _gram(work, basis[step])
        alpha.append(float(image @ basis[step]))
        for _ in range(2):  # twice is enough (Parlett)
            image -= basis[: step + 1].T @ (basis[: step + 1] @ image)
        beta.append(float(image.norm()))
        largest = max(alpha)
        if largest == 0:
            return None
        broke_down = beta[-1] <= 1e-14 * largest
        if broke_down or (step > 2 * rank and step % max(5, step // 20) == 0):
            off = torch.tensor(beta[:-1], dtype=matrix.dtype)
            small = torch.diag(torch.tensor(alpha, dtype=matrix.dtype)) + torch.diag(off, 1) + torch.diag(off, -1)
            values, vectors = (t.flip(-1) for t in torch.linalg.eigh(small))
            if broke_down:
                break
            residual = float((beta[-1] * vectors[-1, :rank]).norm())
            gap = float(values[rank - 1] - values[rank])
            if residual <= max(ACCURACY * gap, BACKWARD * float(values[0])):
                break
        basis[step + 1] = image / beta[-1]
    else:
        return None
    if len(values) < rank or float(values[rank - 1]) <= 1e-14 * float(values[0]):
        return None
    right = basis[: len(values)].T @ vectors[:, :rank]
    if _misses_one(work, right, float(values[rank - 1]), generator):
        return None
    left, weight, right = _exact_triplets(work, right)
    return VectorSum(weight, [left, right] if work is matrix else [right, left])


def _misses_one(work: Tensor, right: Tensor, smallest: float, generator: torch.Generator) -> bool:
    """One start vector sees only one direction of a multiple singular value; a second one finds the others."""
    x = torch.randn(work.shape[1], dtype=work.dtype, generator=generator)
    estimate = 0.0
    for _ in range(4):
        x -= right @ (right.T @ x)
        x /= x.norm()
        image = _gram(work, x)
        estimate = float(image @ x)
        x = image
    return estimate > smallest * (1 + 1e-9)


def follow(matrix: Tensor, start: VectorSum) -> VectorSum:
    """One step of subspace iteration from a sum of products: never further from (m, n) `matrix`.

    The vectors on the shorter side of the result are orthonormal. Large matrices are multiplied in single precision.
    """
    side = shorter_side(matrix)
    scale = max(float(matrix.norm()), torch.finfo(torch.float64).tiny)
    dtype = torch.float32 if matrix.numel() >= SINGLE_FROM else torch.float64
    work = ((matrix if side == 0 else matrix.T) / scale).to(dtype)
    image = (start.vectors[1 - side] * (start.weight / scale)).to(dtype)
    basis = torch.linalg.qr(work @ image)[0]
    image = (work.T @ basis).double() * scale
    return normalised([basis.double(), image] if side == 0 else [image, basis.double()])


def shorter_side(matrix: Tensor) -> int:
    return 0 if matrix.shape[0] <= matrix.shape[1] else 1
