"""The activation-weighted norm ||E C^(1/2)||_F = (E ||E h||^2)^(1/2), with C = E[h h^T].

SVD-LLM (Wang et al., 2024) fits low-rank matrices in it. Here every part of a structure is: low rank exactly, other
Kronecker products by alternating least squares, diagonal entry by entry, sparse residual by its normal equations.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from kruify.decomposition.nearest_sum import nearest
from kruify.decomposition.rearrangement import rearrange, restore
from kruify.decomposition.sparse_residual import Blocks, add_blocks, heaviest
from kruify.decomposition.svd import eigh, follow
from kruify.decomposition.vectors import VectorSum, normalised
from kruify.factors import Shape, Term

DAMPING = 1e-6  # of the mean variance, added to every direction: what was never excited stays near the dense matrix
PROXIMAL = 1e-10
SWEEPS, LATER_SWEEPS, TOLERANCE = 60, 4, 1e-5
SEARCH_SWEEPS, SEARCH_LATER_SWEEPS, SEARCH_TOLERANCE = 6, 2, 1e-3
SYSTEMS = 1 << 24  # entries of the sparse residual's systems that are solved at once


class Weighted:
    """Fits measured by tr(E C E^T), with C (cols, cols) symmetric positive semi-definite (damped by `DAMPING`)."""

    def __init__(self, covariance: Tensor) -> None:
        self.covariance = covariance
        self.sweeps, self.tolerance, self.searching = SWEEPS, TOLERANCE, False
        n = covariance.shape[0]
        mean = float(covariance.diagonal().mean())
        eye = torch.eye(n, dtype=torch.float64)
        self.c = covariance + DAMPING * mean * eye if mean > 0 else eye
        values, vectors = eigh(self.c)
        root = values.clamp(min=DAMPING * max(mean, 1e-300) / 2).sqrt()
        self.root = (vectors * root) @ vectors.T
        self.inverse_root = (vectors / root) @ vectors.T

    def for_search(self) -> Weighted:
        """The same norm, its fits good enough to compare structures: a bound from below on what thorough ones keep."""
        found = copy.copy(self)
        found.sweeps, found.tolerance, found.searching = SEARCH_SWEEPS, SEARCH_TOLERANCE, True
        return found

    def error(self, rest: Tensor) -> float:
        return float((rest @ self.root).square().sum())

    def term(self, rest: Tensor, term: Term, old: VectorSum | None, seed: int) -> VectorSum:
        shapes = term.factors
        whole = [f for f, (_, q) in enumerate(shapes) if q == term.cols]
        if len(shapes) <= 2 and whole:
            # One factor spans all columns, so the weight passes into it and the SVD is exact again.
            tensor = rearrange(rest @ self.root, shapes)
            if self.searching and old is not None and len(shapes) > 1:
                found = follow(tensor.float(), self._turned(old, whole[-1], shapes, self.root).to(torch.float32))
                found = found.to(tensor.dtype)
            else:
                found = nearest(tensor, term.rank, seed=seed)
            return self._turned(found, whole[-1], shapes, self.inverse_root)
        if old is not None:
            start, sweeps = old, SEARCH_LATER_SWEEPS if self.searching else LATER_SWEEPS
        else:
            start, sweeps = self._start(rest, term, seed), self.sweeps
        found = self._alternate(rest, shapes, start, sweeps)
        return found if old is None or self._distance(rest, found, shapes) <= self._distance(rest, old, shapes) else old

    def diagonal(self, rest: Tensor) -> Tensor:
        n = min(rest.shape)
        return (rest @ self.c)[:n].diagonal() / self.c.diagonal()[:n]

    def sparse_residual(self, rest: Tensor, blocks: int, block: int, old: Blocks | None) -> Blocks:
        """Places by the gain each block would bring alone, in rounds that see what earlier rounds took; values by
        least squares. Keeps the old places where new ones are no better: choosing them is a hard problem."""
        found = self._pursuit(rest, blocks, block)
        if old is None:
            return found
        kept = self._solve(rest, old[1], block)
        return found if self._left(rest, found) < self._left(rest, kept) else kept

    def _left(self, rest: Tensor, found: Blocks) -> float:
        rest = rest.clone()
        add_blocks(rest, -found[0], found[1])
        return self.error(rest)

    def _pursuit(self, rest: Tensor, blocks: int, block: int, rounds: int = 4) -> Blocks:
        rows, cols = rest.shape
        left = rest.clone()
        taken = torch.zeros(rows // block, cols, dtype=torch.bool)
        values, index = torch.empty(0, block, dtype=torch.float64), torch.empty(0, 2, dtype=torch.int64)
        for step in range(rounds):
            gain = (left @ self.c).square().reshape(rows // block, block, cols).sum(dim=1) / self.c.diagonal()
            gain[taken] = -1.0
            count = math.ceil(blocks * (step + 1) / rounds) - int(taken.sum())
            picked = heaviest(gain, count)
            taken[picked[:, 0], picked[:, 1]] = True
            index = taken.nonzero() * torch.tensor([block, 1])
            values, index = self._solve(rest, index, block)
            left = rest.clone()
            add_blocks(left, -values, index)
        return values, index

    def _solve(self, rest: Tensor, index: Tensor, block: int) -> Blocks:
        """Best values for given places: one small system per stripe of `block` rows, solved many at once."""
        target = rest @ self.c
        values = torch.empty(len(index), block, dtype=torch.float64)
        stripe, count = torch.unique_consecutive(index[:, 0], return_counts=True)
        if not len(index):
            return values, index
        most = int(count.max())
        together = max(1, SYSTEMS // most**2)
        for rows, sizes, places in zip(
            torch.split(stripe, together), torch.split(count, together), _chunks(count, together), strict=True
        ):
            inside = torch.arange(most) < sizes[:, None]  # (stripes, most): the others pad with the identity
            columns = torch.zeros(len(rows), most, dtype=torch.int64)
            columns[inside] = index[places, 1]
            system = self.c[columns[:, :, None], columns[:, None, :]]
            system = torch.where(inside[:, :, None] & inside[:, None, :], system, torch.eye(most, dtype=torch.float64))
            wanted = target[rows[:, None] + torch.arange(block)]  # (stripes, block, columns)
            wanted = wanted.gather(2, columns[:, None].expand(-1, block, -1)) * inside[:, None]
            values[places] = torch.linalg.solve(system, wanted.mT)[inside]
        return values, index

    def _turned(self, found: VectorSum, factor: int, shapes: tuple[Shape, ...], by: Tensor) -> VectorSum:
        """Puts the root of the weight into the factor that spans all columns, or its inverse: takes it out."""
        p, q = shapes[factor]
        vectors = list(found.vectors)
        cube = vectors[factor].T.reshape(found.rank, p, q) @ by
        vectors[factor] = cube.reshape(found.rank, p * q).T * found.weight
        return normalised(vectors)

    def _start(self, rest: Tensor, term: Term, seed: int) -> VectorSum:
        """The better of two starts: unweighted, and exact for the nearest Kronecker product to C instead of C."""
        shapes = term.factors
        refined = 0 if self.searching else 200  # sweeps of three factors and more
        starts = [nearest(rearrange(rest, shapes), term.rank, seed=seed, restarts=0, sweeps=refined)]
        squares = [(q, q) for _, q in shapes]
        weight = nearest(rearrange(self.c, squares), 1, seed=seed, restarts=0, sweeps=refined)
        roots = [_roots(v[:, 0].reshape(square)) for v, square in zip(weight.vectors, squares, strict=True)]
        whitened = rest
        for f in range(len(shapes)):
            before = math.prod(q for _, q in shapes[:f])
            modes = whitened.reshape(rest.shape[0], before, shapes[f][1], -1)
            whitened = torch.einsum("nbqa,qp->nbpa", modes, roots[f][0]).reshape(rest.shape)
        found = nearest(rearrange(whitened, shapes), term.rank, seed=seed, restarts=0, sweeps=refined)
        vectors = [
            (v.T.reshape(found.rank, *shape) @ inverse).reshape(found.rank, -1).T
            for v, shape, (_, inverse) in zip(found.vectors, shapes, roots, strict=True)
        ]
        vectors[0] = vectors[0] * found.weight
        starts.append(normalised(vectors))
        return min(starts, key=lambda s: self._distance(rest, s, shapes))

    def _distance(self, rest: Tensor, current: VectorSum, shapes: tuple[Shape, ...]) -> float:
        return self.error(rest - restore(current.dense(), shapes))

    def _alternate(self, rest: Tensor, shapes: tuple[Shape, ...], start: VectorSum, sweeps: int) -> VectorSum:
        """Each factor of all products in turn by least squares. The rows of a factor are independent of each other:
        all share one (rank q, rank q) system."""
        live = start.weight > 0
        rank = int(live.sum())
        if rank == 0:
            return start
        share = start.weight[live] ** (1 / len(shapes))
        factors = [(v[:, live] * share).T.reshape(rank, p, q) for v, (p, q) in zip(start.vectors, shapes, strict=True)]
        target = rest @ self.c
        total = float((target * rest).sum())
        error = math.inf
        for _ in range(sweeps):
            inner = 0.0
            for f in range(len(shapes)):
                factors[f], inner = best_factor(target, self.c, shapes, factors, f)
            before, error = error, total - inner
            factors = _evened(factors)
            if before - error <= self.tolerance * abs(error):
                break
        return normalised([f.reshape(rank, -1).T for f in factors])


def best_factor(
    target: Tensor, c: Tensor, shapes: tuple[Shape, ...], factors: list[Tensor], f: int
) -> tuple[Tensor, float]:
    """The best factor f (rank, p, q) with the others given, and how much it takes off the squared error.

    Args:
        target: (rows, cols), W C.
        factors: one (rank, p, q) per shape; the f-th is only what the solution stays near where it is undetermined.
    """
    p, q = shapes[f]
    rank = factors[0].shape[0]
    rows = [math.prod(s[0] for s in part) for part in (shapes[:f], shapes[f + 1 :])]
    cols = [math.prod(s[1] for s in part) for part in (shapes[:f], shapes[f + 1 :])]
    others = torch.ones(rank, 1, 1, dtype=torch.float64)
    for g, factor in enumerate(factors):
        if g != f:
            others = torch.einsum("rab,rcd->racbd", others, factor).reshape(rank, others.shape[1] * factor.shape[1], -1)
    n = cols[0] * cols[1]
    modes = c.reshape(cols[0], q, cols[1], cols[0], q, cols[1])
    height = others.shape[1]
    if rank * n <= height * q * q:  # products of the others first, or their images under C: whichever is smaller
        inner_products = (
            others.transpose(1, 2).reshape(rank * n, height) @ others.transpose(0, 1).reshape(height, rank * n)
        ).reshape(rank, n, rank, n)
        weight = modes.permute(0, 2, 3, 5, 1, 4).reshape(n * n, q * q)
        flat = inner_products.transpose(1, 2).reshape(rank * rank, n * n) @ weight
        system = flat.reshape(rank, rank, q, q).transpose(1, 2).reshape(rank * q, rank * q)
    else:
        weight = modes.permute(0, 2, 1, 4, 3, 5).reshape(n, q * q * n)
        image = (others.reshape(rank * height, n) @ weight).reshape(rank, height, q, q, n)
        image = image.permute(0, 2, 3, 1, 4).reshape(rank * q * q, height * n)
        flat = image @ others.reshape(rank, height * n).T
        system = flat.reshape(rank, q, q, rank).transpose(2, 3).reshape(rank * q, rank * q)
    wanted = target.reshape(rows[0], p, rows[1], cols[0], q, cols[1]).permute(1, 4, 0, 2, 3, 5).reshape(p * q, -1)
    right = (wanted @ others.reshape(rank, -1).T).reshape(p, q, rank).permute(2, 1, 0).reshape(rank * q, p)
    old = factors[f].permute(0, 2, 1).reshape(rank * q, p)
    ridge = PROXIMAL * float(system.diagonal().mean())
    lhs = system + ridge * torch.eye(len(system), dtype=torch.float64)
    root, info = torch.linalg.cholesky_ex(lhs)
    if int(info) == 0:
        new = torch.cholesky_solve(right + ridge * old, root)
    else:
        new = torch.linalg.lstsq(lhs, right + ridge * old, driver="gelsd").solution
    inner = float((2 * new * right).sum() - (new * (system @ new)).sum())
    return new.reshape(rank, q, p).permute(0, 2, 1), inner


def _chunks(count: Tensor, together: int) -> list[slice]:
    """Where the blocks of each group of `together` stripes stand in an index sorted by rows."""
    sizes = [int(part.sum()) for part in torch.split(count, together)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of a positive semi-definite factor, whose sign the SVD leaves open."""
    covariance = (covariance + covariance.T) / 2
    if float(covariance.trace()) < 0:
        covariance = -covariance
    values, vectors = eigh(covariance)
    root = values.clamp(min=1e-8 * float(values.max())).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _evened(factors: list[Tensor]) -> list[Tensor]:
    """The same products with the norm of each shared out evenly over its factors."""
    norms = torch.stack([f.flatten(1).norm(dim=1) for f in factors])
    mean = norms.log().mean(dim=0).exp()
    safe = norms.where(norms > 0, torch.ones_like(norms))
    return [f * (mean / n)[:, None, None] for f, n in zip(factors, safe, strict=True)]
