"""`fit`: one dense matrix -> the numbers of a `Structure`, with the exact error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from kruify import kronecker
from kruify.decompose.nearest import nearest
from kruify.decompose.overlay import add_overlay, best_overlay
from kruify.decompose.rearrange import rearrange, restore
from kruify.decompose.vectors import VectorSum
from kruify.errors import UnsupportedError, UsageError
from kruify.factors import Structure, Term

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
        overlay: (values (blocks, block), index (blocks, 2) int64 = first row, column; ascending) or None.
        energy: 1 - ||W - K||^2 / ||W||^2; 1 for a zero matrix. A weighted fit may make it negative.
        energy_null: the energy that the same structure keeps of a matrix of this size without any structure
            (independent Gaussian entries); energy at this level means that the shapes have found nothing in W.
        relative_error: ||W - K|| / ||W||; 0 for a zero matrix.
    """

    structure: Structure
    terms: list[Products]
    diagonal: Tensor | None
    overlay: tuple[Tensor, Tensor] | None
    energy: float
    energy_null: float
    relative_error: float

    def to_dense(self) -> Tensor:  # (rows, cols) float64
        s = self.structure
        dense = torch.zeros(s.rows, s.cols, dtype=torch.float64)
        for scale, factors in self.terms:
            dense += kronecker.to_dense([f[None] for f in factors], scale[None])[0]
        if self.diagonal is not None:
            dense.diagonal().add_(self.diagonal)
        if self.overlay is not None:
            add_overlay(dense, *self.overlay)
        return dense


def fit(
    matrix: Tensor,
    structure: Structure,
    *,
    covariance: Tensor | None = None,
    seed: int = 0,
    null: bool = True,
) -> Fit:
    """The structure's best approximation of one matrix, computed in float64.

    One term of two factors: exactly optimal (Van Loan & Pitsianis 1993). More factors, sums of different shapes,
    diagonal and overlay: greedy, then every part is fitted again to what the others leave, until that stops helping.

    Args:
        matrix: (rows, cols), one gate, of any floating dtype.
        structure: what to fit; structure.rows, .cols must be the matrix's.
        covariance: (cols, cols), C = E[h h^T] of what the matrix is applied to: minimise E||(W - K) h||^2 instead.
        seed: of the random starts for three factors and more.
        null: also find `energy_null` (cached per structure); False leaves it NaN.

    Raises:
        UsageError: not a 2-d floating tensor, empty, or of another size than the structure or the covariance.
        UnsupportedError: NaN or infinite entries.
    """
    w = checked(matrix, structure, covariance)
    state = _backfit(w, structure, seed)
    terms = [_products(state.sums[i], term, seed) for i, term in enumerate(structure.terms)]
    result = Fit(structure, terms, state.diagonal, state.overlay, 1.0, float("nan"), 0.0)
    total = float(w.square().sum())
    if total > 0:
        lost = float((w - result.to_dense()).square().sum()) / total
        result = replace(result, energy=1 - lost, relative_error=lost**0.5)
    return replace(result, energy_null=null_energy(structure)) if null else result


@lru_cache(maxsize=512)
def null_energy(structure: Structure, seed: int = 0) -> float:
    """The energy that `structure` keeps of one seeded matrix of independent standard normal entries."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(structure.rows, structure.cols, generator=generator, dtype=torch.float64)
    return fit(w, replace(structure, scaled=False), null=False).energy


def checked(matrix: Tensor, structure: Structure, covariance: Tensor | None = None) -> Tensor:
    """The matrix in float64 on the CPU, or an error that says what is wrong with it."""
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise UsageError(f"a matrix to decompose has two dimensions and is not empty, got shape {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise UsageError(f"a matrix to decompose holds floating-point numbers, got {matrix.dtype}")
    if tuple(matrix.shape) != (structure.rows, structure.cols):
        raise UsageError(
            f"the matrix is {matrix.shape[0]}x{matrix.shape[1]}, the structure {structure.rows}x{structure.cols}",
            hint="Resolve the spec with the size of the matrix",
        )
    w = matrix.detach().to("cpu", torch.float64)
    _finite(w, "the matrix")
    if covariance is not None:
        if tuple(covariance.shape) != (structure.cols, structure.cols):
            raise UsageError(
                f"the covariance of a matrix with {structure.cols} columns is {structure.cols}x{structure.cols}, "
                f"got shape {tuple(covariance.shape)}"
            )
        _finite(covariance, "the covariance")
    return w


def _finite(tensor: Tensor, name: str) -> None:
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise UnsupportedError(
            f"{name} has {bad} entries that are NaN or infinite", hint="Use a checkpoint from before training diverged"
        )


@dataclass
class _State:
    sums: list[VectorSum | None]
    diagonal: Tensor | None = None
    overlay: tuple[Tensor, Tensor] | None = None


def _backfit(w: Tensor, structure: Structure, seed: int, sweeps: int = 30, tolerance: float = 1e-4) -> _State:
    """Fits every part of the structure to what the others leave: first in order, then around again."""
    state = _State([None] * len(structure.terms))
    parts = len(structure.terms) + int(structure.diagonal) + int(structure.sparse_blocks > 0)
    lone = parts == 1 and bool(structure.terms)  # needs no residual of its own: saves a copy of the matrix
    rest = w if lone else w.clone()
    total = error = float(w.square().sum())
    for _ in range(1 if lone else sweeps):
        for i, term in enumerate(structure.terms):
            old = state.sums[i]
            if old is not None:
                rest += restore(old.dense(), term.factors)
            tensor = rearrange(rest, term.factors)
            state.sums[i] = new = nearest(tensor, term.rank, seed=seed, start=old, sweeps=200 if old is None else 10)
            if not lone:
                rest -= restore(new.dense(), term.factors)
        if structure.diagonal:
            if state.diagonal is not None:
                rest.diagonal().add_(state.diagonal)
            state.diagonal = rest.diagonal().clone()
            rest.diagonal().zero_()
        if structure.sparse_blocks:
            if state.overlay is not None:
                add_overlay(rest, *state.overlay)
            values, index = best_overlay(rest, structure.sparse_blocks, structure.block)
            state.overlay = values, index
            add_overlay(rest, -values, index)
        before, error = error, float(rest.square().sum())
        if before - error <= tolerance * error or error <= 1e-28 * total:
            break
    return state


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
        factor = torch.empty(term.rank, p, q, dtype=torch.float64)
        factor[:count] = vectors[:, live].T.reshape(count, p, q) * norm
        for r in range(count, term.rank):
            torch.nn.init.orthogonal_(factor[r], generator=generator)
        scale[:count] /= norm
        factors.append(factor)
    return scale, factors
