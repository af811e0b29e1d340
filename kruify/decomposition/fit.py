"""`fit`: one dense matrix -> the numbers of a `Structure`, with the exact error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from kruify import kronecker
from kruify.decomposition.nearest import nearest
from kruify.decomposition.null import gaussian_energy
from kruify.decomposition.overlay import add_overlay
from kruify.decomposition.plain import Plain
from kruify.decomposition.rearrange import restore
from kruify.decomposition.vectors import VectorSum
from kruify.decomposition.weighted import Weighted
from kruify.errors import UnsupportedError, UsageError
from kruify.factors import Structure, Term

LARGE = 1 << 21  # entries from which the null level of a pair of factors comes from theory
THOROUGH = 10  # rounds from which a sum is fitted from two starts
BACKFIT_TOLERANCE = 1e-4  # of the remaining error, a round
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
        energy_weighted: 1 - E||(W - K) h||^2 / E||W h||^2 of a weighted fit, NaN of others.
    """

    structure: Structure
    terms: list[Products]
    diagonal: Tensor | None
    overlay: tuple[Tensor, Tensor] | None
    energy: float
    energy_null: float
    relative_error: float
    energy_weighted: float = float("nan")

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
    sweeps: int = 30,
) -> Fit:
    """The structure's best approximation of one matrix, computed in float64.

    One term of two factors: exactly optimal (Van Loan & Pitsianis 1993). More factors, sums of different shapes,
    diagonal and overlay: greedy (the part that alone keeps most comes first), then every part is fitted again to what
    the others leave until that stops helping (hKoPA: Cai, Chen & Xiao, JMLR 2022).

    Args:
        matrix: (rows, cols), one gate, of any floating dtype.
        structure: what to fit; structure.rows, .cols must be the matrix's.
        covariance: (cols, cols), C = E[h h^T] of what the matrix is applied to: minimise E||(W - K) h||^2 instead.
        seed: of the random starts for three factors and more.
        null: also find `energy_null` (cached per structure); False leaves it NaN.
        sweeps: at most so many rounds over the parts of a sum.

    Raises:
        UsageError: not a 2-d floating tensor, empty, or of another size than the structure; a covariance that is not
            symmetric positive semi-definite of the right size.
        UnsupportedError: NaN or infinite entries.
    """
    check(matrix, structure)
    metric = metric_of(covariance, structure.cols)
    result = fit_with(metric, matrix, structure, seed=seed, sweeps=sweeps)
    return replace(result, energy_null=null_energy(structure)) if null else result


def metric_of(covariance: Tensor | None, cols: int) -> Plain | Weighted:
    """The norm of a fit, checked; making it once serves all gates of a matrix."""
    return Plain() if covariance is None else Weighted(checked_covariance(covariance, cols))


def fit_with(metric: Metric, matrix: Tensor, structure: Structure, *, seed: int = 0, sweeps: int = 30) -> Fit:
    """`fit` of a matrix known to be sound in a given norm, without the null level."""
    if isinstance(metric, Plain) and _is_one_product_pair(structure):
        return _fit_pair(matrix, structure, seed)
    w = _wide(matrix)
    state = _backfit(w, structure, metric, seed, sweeps)
    terms = [_products(state.sums[i], term, seed) for i, term in enumerate(structure.terms)]
    result = Fit(structure, terms, state.diagonal, state.overlay, 1.0, float("nan"), 0.0)
    return _measured(w, result, metric.covariance if isinstance(metric, Weighted) else None)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.detach().to("cpu", torch.float64)


def _measured(w: Tensor, result: Fit, covariance: Tensor | None) -> Fit:
    rest = result.to_dense().sub_(w)
    total, lost = float(w.square().sum()), float(rest.square().sum())
    if total > 0:
        result = replace(result, energy=1 - lost / total, relative_error=(lost / total) ** 0.5)
    if covariance is not None:
        lost, total = float(((rest @ covariance) * rest).sum()), float(((w @ covariance) * w).sum())
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
    return Fit(structure, [_products(found, term, seed)], None, None, 1 - lost, float("nan"), lost**0.5)


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
    return fit(w, replace(structure, scaled=False), null=False).energy


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
    if float(torch.linalg.eigvalsh(c)[0]) < -1e-6 * largest:
        raise UsageError("the covariance is not positive semi-definite")
    return c


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


class Metric(Protocol):
    """How each part of a structure is fitted to what the other parts leave, and how that is measured."""

    def error(self, rest: Tensor) -> float: ...
    def term(self, rest: Tensor, term: Term, old: VectorSum | None, seed: int) -> VectorSum: ...
    def diagonal(self, rest: Tensor) -> Tensor: ...
    def overlay(self, rest: Tensor, blocks: int, block: int, old: Tensor | None) -> tuple[Tensor, Tensor]: ...


def _backfit(w: Tensor, structure: Structure, metric: Metric, seed: int, sweeps: int) -> _State:
    """Sums have local optima, and the order in which the parts enter decides which is found: a thorough fit tries the
    greedy order and its reverse."""
    state, error, order = _descend(w, structure, metric, seed, sweeps, None)
    if len(order) > 1 and sweeps >= THOROUGH and w.numel() <= LARGE:
        other, other_error, _ = _descend(w, structure, metric, seed, sweeps, order[::-1])
        if other_error < error:
            return other
    return state


def _descend(
    w: Tensor, structure: Structure, metric: Metric, seed: int, sweeps: int, order: list[int] | None
) -> tuple[_State, float, list[int]]:
    """One start and its rounds: (what was found, its squared error, the order in which the parts entered)."""
    state = _State([None] * len(structure.terms))
    parts: list[_Part] = [_TermPart(state, i, term, metric, seed) for i, term in enumerate(structure.terms)]
    if structure.diagonal:
        parts.append(_DiagonalPart(state, metric))
    if structure.sparse_blocks:
        parts.append(_OverlayPart(state, metric, structure.sparse_blocks, structure.block))
    if len(parts) == 1:
        parts[0].update(w)
        return state, 0.0, [0]
    rest = w.clone()
    total = error = metric.error(rest)
    entered: list[int] = []
    while len(entered) < len(parts):
        place = order[len(entered)] if order is not None else _greediest(parts, entered, rest, metric)
        entered.append(place)
        parts[place].update(rest)
        parts[place].add(rest, -1)
    for _ in range(sweeps):
        before, error = error, metric.error(rest)
        if before - error <= BACKFIT_TOLERANCE * error or error <= 1e-28 * total:
            break
        for part in parts:
            part.add(rest, 1)
            part.update(rest)
            part.add(rest, -1)
    return state, metric.error(rest), entered


def _greediest(parts: list[_Part], entered: list[int], rest: Tensor, metric: Metric) -> int:
    """The term that alone takes the most off what is left; diagonal and overlay come last, since an overlay that enters
    first holds what the terms could have held for less."""
    waiting = [place for place in range(len(parts)) if place not in entered]
    waiting = [place for place in waiting if isinstance(parts[place], _TermPart)] or waiting[:1]
    if len(waiting) == 1:
        return waiting[0]
    errors = []
    for place in waiting:
        parts[place].update(rest)
        parts[place].add(rest, -1)
        errors.append(metric.error(rest))
        parts[place].add(rest, 1)
        parts[place].forget()
    return waiting[errors.index(min(errors))]


class _Part(Protocol):
    def update(self, rest: Tensor) -> None: ...
    def add(self, rest: Tensor, sign: int) -> None: ...
    def forget(self) -> None: ...


@dataclass
class _TermPart:
    state: _State
    place: int
    term: Term
    metric: Metric
    seed: int

    def update(self, rest: Tensor) -> None:
        self.state.sums[self.place] = self.metric.term(rest, self.term, self.state.sums[self.place], self.seed)

    def add(self, rest: Tensor, sign: int) -> None:
        found = self.state.sums[self.place]
        assert found is not None
        rest.add_(restore(found.dense(), self.term.factors), alpha=sign)

    def forget(self) -> None:
        self.state.sums[self.place] = None


@dataclass
class _DiagonalPart:
    state: _State
    metric: Metric

    def update(self, rest: Tensor) -> None:
        self.state.diagonal = self.metric.diagonal(rest)

    def add(self, rest: Tensor, sign: int) -> None:
        assert self.state.diagonal is not None
        rest.diagonal().add_(self.state.diagonal, alpha=sign)

    def forget(self) -> None:
        self.state.diagonal = None


@dataclass
class _OverlayPart:
    state: _State
    metric: Metric
    blocks: int
    block: int

    def update(self, rest: Tensor) -> None:
        old = None if self.state.overlay is None else self.state.overlay[1]
        self.state.overlay = self.metric.overlay(rest, self.blocks, self.block, old)

    def add(self, rest: Tensor, sign: int) -> None:
        assert self.state.overlay is not None
        add_overlay(rest, sign * self.state.overlay[0], self.state.overlay[1])

    def forget(self) -> None:
        self.state.overlay = None


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
