"""`fit`: one dense matrix -> the numbers of a `Structure`, with the exact error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kruify import kronecker
from kruify.decomposition.backfitting import Metric, backfit
from kruify.decomposition.frobenius import Frobenius
from kruify.decomposition.nearest_sum import nearest
from kruify.decomposition.random_matrix import gaussian_energy
from kruify.decomposition.sparse_residual import Blocks, add_blocks
from kruify.decomposition.vectors import VectorSum
from kruify.decomposition.weighted import Weighted
from kruify.errors import UnsupportedError, UsageError
from kruify.factors import Structure, Term

LARGE = 1 << 21  # entries from which the null level of a pair of factors comes from theory
NULL_SWEEPS = 5  # of the fit that measures it elsewhere
Products = tuple[Tensor, list[Tensor]]  # scale (rank,), one factor tensor (rank, P_f, Q_f) per factor


@dataclass(frozen=True)
class Fit:
    """The numbers that put a `Structure` in the place of one dense matrix W. All tensors are float64.

    Attributes:
        structure: what was fitted.
        terms: one (scale, factors) per term of the structure, in its order: scale (rank,) >= 0, factors[f]
            (rank, P_f, Q_f), each product's factors of Frobenius norm sqrt(min(P_f, Q_f)). A product with scale 0
            (more terms than the matrix needs) has orthogonal factors all the same, so that it can still be trained.
        diagonal: (min(rows, cols),) or None.
        sparse_residual: (values (blocks, block), index (blocks, 2) int64 = first row, column; ascending) or None.
        energy: 1 - ||W - K||^2 / ||W||^2; 1 for a zero matrix. A weighted fit may make it negative.
        relative_error: ||W - K|| / ||W||; 0 for a zero matrix.
        energy_weighted: 1 - E||(W - K) h||^2 / E||W h||^2 of a weighted fit, NaN of others.
    """

    structure: Structure
    terms: list[Products]
    diagonal: Tensor | None
    sparse_residual: Blocks | None
    energy: float
    relative_error: float
    energy_weighted: float = float("nan")

    def to_dense(self) -> Tensor:  # (rows, cols) float64
        s = self.structure
        dense = torch.zeros(s.rows, s.cols, dtype=torch.float64)
        for scale, factors in self.terms:
            dense += kronecker.to_dense([f[None] for f in factors], scale[None])[0]
        if self.diagonal is not None:
            dense.diagonal().add_(self.diagonal)
        if self.sparse_residual is not None:
            add_blocks(dense, *self.sparse_residual)
        return dense

    @property
    def energy_null(self) -> float:
        """`null_energy` of the structure; energy at this level means that the shapes have found nothing in W."""
        return null_energy(self.structure)


def fit(
    matrix: Tensor,
    structure: Structure,
    *,
    covariance: Tensor | None = None,
    seed: int = 0,
    sweeps: int = 30,
) -> Fit:
    """The structure's best approximation of one matrix, computed in float64.

    One term of two factors: exactly optimal (Van Loan & Pitsianis 1993). More factors, sums of different shapes,
    diagonal and sparse residual: greedy (the part that alone keeps most comes first), then every part is fitted again
    to what the others leave until that stops helping (hKoPA: Cai, Chen & Xiao, JMLR 2022).

    Args:
        matrix: (rows, cols), one gate, of any floating dtype.
        structure: what to fit; structure.rows, .cols must be the matrix's.
        covariance: (cols, cols), C = E[h h^T] of what the matrix is applied to: minimise E||(W - K) h||^2 instead.
        seed: of the random starts for three factors and more.
        sweeps: at most so many rounds over the parts of a sum.

    Raises:
        UsageError: not a 2-d floating tensor, empty, or of another size than the structure; a covariance that is not
            symmetric positive semi-definite of the right size.
        UnsupportedError: NaN or infinite entries.
    """
    check(matrix, structure)
    return fit_with(metric_of(covariance, structure.cols), matrix, structure, seed=seed, sweeps=sweeps)


def metric_of(covariance: Tensor | None, cols: int) -> Metric:
    """The norm of a fit, checked; making it once serves all gates of a matrix."""
    return Frobenius() if covariance is None else Weighted(checked_covariance(covariance, cols))


def fit_with(metric: Metric, matrix: Tensor, structure: Structure, *, seed: int = 0, sweeps: int = 30) -> Fit:
    """`fit` of a matrix known to be sound in a given norm."""
    if isinstance(metric, Frobenius) and _is_one_product_pair(structure):
        return _fit_pair(matrix, structure, seed)
    w = matrix.detach().to("cpu", torch.float64)
    parts, _ = backfit(w, structure, metric, seed, sweeps)
    terms = [_products(found, term, seed) for found, term in zip(parts.terms, structure.terms, strict=True)]
    result = Fit(structure, terms, parts.diagonal, parts.sparse_residual, energy=1.0, relative_error=0.0)
    rest = result.to_dense().sub_(w)
    total, lost = float(w.square().sum()), float(rest.square().sum())
    if total > 0:
        result = replace(result, energy=1 - lost / total, relative_error=(lost / total) ** 0.5)
    if isinstance(metric, Weighted):
        c = metric.covariance
        lost, total = float(((rest @ c) * rest).sum()), float(((w @ c) * w).sum())
        result = replace(result, energy_weighted=1 - lost / total if total > 0 else 1.0)
    return result


def _is_one_product_pair(structure: Structure) -> bool:
    lone = len(structure.terms) == 1 and not structure.diagonal and not structure.sparse_blocks
    return lone and len(structure.terms[0].factors) == 2


def _fit_pair(matrix: Tensor, structure: Structure, seed: int) -> Fit:
    """One term of two factors. The rearranged copy is the only array of the matrix's size: it is where the SVD works
    and where the residual, whose norm the rearrangement keeps, is formed."""
    term = structure.terms[0]
    source = matrix.detach()
    (p0, q0), (p1, q1) = term.factors
    rearranged = torch.empty(p0, q0, p1, q1, dtype=torch.float64)
    rearranged.copy_(source.reshape(p0, p1, q0, q1).permute(0, 2, 1, 3))
    rest = rearranged.reshape(p0 * q0, p1 * q1)
    found = nearest(rest, term.rank, seed=seed)
    total = float(rest.norm()) ** 2
    rest.addmm_(found.vectors[0] * found.weight, found.vectors[1].T, alpha=-1)
    lost = float(rest.norm()) ** 2 / total if total > 0 else 0.0
    return Fit(structure, [_products(found, term, seed)], None, None, energy=1 - lost, relative_error=lost**0.5)


@lru_cache(maxsize=512)
def null_energy(structure: Structure, seed: int = 0) -> float:
    """The energy that `structure` keeps of a matrix of independent standard normal entries.

    Measured on one seeded matrix; for one term of two factors on a large matrix, the Marchenko-Pastur law.
    """
    if _is_one_product_pair(structure) and structure.dense_parameters > LARGE:
        term = structure.terms[0]
        (p0, q0), (p1, q1) = term.factors
        return gaussian_energy(p0 * q0, p1 * q1, term.rank)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(structure.rows, structure.cols, generator=generator, dtype=torch.float64)
    return fit(w, replace(structure, scaled=False), sweeps=NULL_SWEEPS).energy


def check(matrix: Tensor, structure: Structure) -> None:
    """Raises the error that says what is wrong with a matrix, if anything is."""
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise UsageError(f"a matrix to decompose has two dimensions and is not empty, got shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise UsageError(f"a matrix to decompose holds floating-point numbers, got {matrix.dtype}")
    if tuple(matrix.shape) != (structure.rows, structure.cols):
        raise UsageError(
            f"the matrix is {matrix.shape[0]}x{matrix.shape[1]}, the structure {structure.rows}x{structure.cols}",
            hint="Resolve the spec with the size of the matrix",
        )
    _finite(matrix, "the matrix")


def checked_covariance(covariance: Tensor, cols: int) -> Tensor:
    """The covariance in float64, exactly symmetric, or an error."""
    if tuple(covariance.shape) != (cols, cols):
        raise UsageError(
            f"the covariance of a matrix with {cols} columns is {cols}x{cols}, got shape {tuple(covariance.shape)}"
        )
    _finite(covariance, "the covariance")
    c = covariance.detach().to("cpu", torch.float64)
    largest = float(c.abs().max())
    if float((c - c.T).abs().max()) > 1e-6 * largest:
        raise UsageError("the covariance is not symmetric")
    c = (c + c.T) / 2
    shifted = c + 1e-6 * largest * torch.eye(cols, dtype=c.dtype)
    if largest > 0 and int(torch.linalg.cholesky_ex(shifted).info) > 0:  # much faster than the eigenvalues
        raise UsageError("the covariance is not positive semi-definite")
    return c


def _finite(tensor: Tensor, name: str) -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        entries = "entry that is" if bad == 1 else "entries that are"
        hint = "Use a checkpoint from before training diverged"
        raise UnsupportedError(f"{name} has {bad} {entries} NaN or infinite", hint=hint)


def _products(found: VectorSum | None, term: Term, seed: int) -> Products:
    """Vectors -> factors with the norms of orthogonal ones, the scale separate; missing products get scale 0."""
    assert found is not None
    generator = torch.Generator().manual_seed(seed)
    live = found.weight > 0
    count = int(live.sum())
    scale = torch.zeros(term.rank, dtype=torch.float64)
    scale[:count] = found.weight[live]
    factors = []
    for (p, q), vectors in zip(term.factors, found.vectors, strict=True):
        norm = min(p, q) ** 0.5
        factor = torch.empty(term.rank, p, q, dtype=vectors.dtype)
        factor[:count] = vectors[:, live].T.reshape(count, p, q) * norm
        for r in range(count, term.rank):
            torch.nn.init.orthogonal_(factor[r], generator=generator)
        scale[:count] /= norm
        factors.append(factor)
    return scale, factors
