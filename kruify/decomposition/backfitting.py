"""Backfitting: every part of a structure in turn is fitted to what the others leave (hKoPA: Cai, Chen & Xiao 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kruify.decomposition.frobenius import Frobenius
from kruify.decomposition.rearrangement import restore
from kruify.decomposition.sparse_residual import Blocks, add_blocks
from kruify.decomposition.vectors import VectorSum
from kruify.decomposition.weighted import Weighted
from kruify.factors import Structure, Term

LARGE = 1 << 21  # entries from which one start has to do
THOROUGH = 10  # rounds from which a sum is fitted from two starts
TOLERANCE = 1e-4  # of the remaining error, per round
Metric = Frobenius | Weighted
"""How each part of a structure is fitted to what the other parts leave, and how that is measured."""


@dataclass
class Parts:
    """What the parts of a structure hold; None for one that has not been fitted, or is not part of it."""

    terms: list[VectorSum | None]
    diagonal: Tensor | None = None
    sparse_residual: Blocks | None = None


def backfit(w: Tensor, structure: Structure, metric: Metric, seed: int, sweeps: int) -> Parts:
    """Sums have local optima, and the order in which the parts enter decides which is found: a thorough fit tries the
    greedy order and its reverse.

    Args:
        w: (rows, cols) float64.
        sweeps: at most so many rounds over the parts.
    """
    found, error, order = _descend(w, structure, metric, seed, sweeps, None)
    if len(order) > 1 and sweeps >= THOROUGH and w.numel() <= LARGE:
        other, other_error, _ = _descend(w, structure, metric, seed, sweeps, order[::-1])
        if other_error < error:
            return other
    return found


def _descend(
    w: Tensor, structure: Structure, metric: Metric, seed: int, sweeps: int, order: list[int] | None
) -> tuple[Parts, float, list[int]]:
    """One start and its rounds: (what was found, its squared error, the order in which the parts entered)."""
    found = Parts([None] * len(structure.terms))
    parts: list[_Part] = [_TermPart(found, metric, i, term, seed) for i, term in enumerate(structure.terms)]
    if structure.diagonal:
        parts.append(_DiagonalPart(found, metric))
    if structure.sparse_blocks:
        parts.append(_SparsePart(found, metric, structure.sparse_blocks, structure.block))
    if len(parts) == 1:
        parts[0].update(w)
        return found, 0.0, [0]
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
        if before - error <= TOLERANCE * error or error <= 1e-28 * total:
            break
        for part in parts:
            part.add(rest, 1)
            part.update(rest)
            part.add(rest, -1)
    return found, metric.error(rest), entered


def _greediest(parts: list[_Part], entered: list[int], rest: Tensor, metric: Metric) -> int:
    """The term that alone takes the most off what is left; diagonal and sparse residual come last, since one that
    enters first holds what the terms could have held for less."""
    waiting = [place for place in range(len(parts)) if place not in entered]
    terms = [(place, part) for place in waiting if isinstance(part := parts[place], _TermPart)]
    if len(terms) < 2:
        return terms[0][0] if terms else waiting[0]
    errors = []
    for _, part in terms:
        part.update(rest)
        part.add(rest, -1)
        errors.append(metric.error(rest))
        part.add(rest, 1)
        part.found.terms[part.place] = None
    return terms[errors.index(min(errors))][0]


@dataclass
class _Part:
    """One part: `update` fits it to `rest` (rows, cols), `add` adds `sign` times what it holds to `rest` in place."""

    found: Parts
    metric: Metric

    def update(self, rest: Tensor) -> None:
        raise NotImplementedError

    def add(self, rest: Tensor, sign: int) -> None:
        raise NotImplementedError


@dataclass
class _TermPart(_Part):
    place: int
    term: Term
    seed: int

    def update(self, rest: Tensor) -> None:
        self.found.terms[self.place] = self.metric.term(rest, self.term, self.found.terms[self.place], self.seed)

    def add(self, rest: Tensor, sign: int) -> None:
        products = self.found.terms[self.place]
        assert products is not None
        rest.add_(restore(products.dense(), self.term.factors), alpha=sign)


class _DiagonalPart(_Part):
    def update(self, rest: Tensor) -> None:
        self.found.diagonal = self.metric.diagonal(rest)

    def add(self, rest: Tensor, sign: int) -> None:
        assert self.found.diagonal is not None
        rest.diagonal().add_(self.found.diagonal, alpha=sign)


@dataclass
class _SparsePart(_Part):
    blocks: int
    block: int

    def update(self, rest: Tensor) -> None:
        old = self.found.sparse_residual
        self.found.sparse_residual = self.metric.sparse_residual(rest, self.blocks, self.block, old)

    def add(self, rest: Tensor, sign: int) -> None:
        assert self.found.sparse_residual is not None
        values, index = self.found.sparse_residual
        add_blocks(rest, sign * values, index)
