"""Backfitting: every part of a structure in turn is fitted to what the others leave (hKoPA: Cai, Chen & Xiao 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kruify.decomposition.frobenius import Frobenius
from kruify.decomposition.rearrangement import restore
from kruify.decomposition.sparse_residual import Blocks, add_blocks
from kruify.decomposition.vectors import VectorSum
from kruify.decomposition.weighted import Weighted
from kruify.factors import Structure

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


def backfit(w: Tensor, structure: Structure, metric: Metric, seed: int, sweeps: int) -> tuple[Parts, float]:
    """Sums have local optima, and the order in which the parts enter decides which is found: a thorough fit tries the
    greedy order and its reverse.

    Args:
        w: (rows, cols) float64.
        sweeps: at most so many rounds over the parts.

    Returns:
        what was found, and its squared error.
    """
    found, error, order = _descend(w, structure, metric, seed, sweeps, None)
    if len(order) > 1 and sweeps >= THOROUGH and w.numel() <= LARGE:
        other, other_error, _ = _descend(w, structure, metric, seed, sweeps, order[::-1])
        if other_error < error:
            return other, other_error
    return found, error


def _descend(
    w: Tensor, structure: Structure, metric: Metric, seed: int, sweeps: int, order: list[int] | None
) -> tuple[Parts, float, list[int]]:
    """One start and its rounds: (what was found, its squared error, the order in which the parts entered)."""
    parts = _Descent(structure, metric, seed, Parts([None] * len(structure.terms)))
    places = parts.places()
    if len(places) == 1:
        parts.update(places[0], w)
        rest = w.clone()
        parts.add(places[0], rest, -1)
        return parts.found, metric.error(rest), places
    rest = w.clone()
    total = error = metric.error(rest)
    entered: list[int] = []
    while len(entered) < len(places):
        place = order[len(entered)] if order is not None else parts.greediest(entered, rest)
        entered.append(place)
        parts.update(place, rest)
        parts.add(place, rest, -1)
    for _ in range(sweeps):
        before, error = error, metric.error(rest)
        if before - error <= TOLERANCE * error or error <= 1e-28 * total:
            break
        for place in places:
            parts.add(place, rest, 1)
            parts.update(place, rest)
            parts.add(place, rest, -1)
    return parts.found, metric.error(rest), entered


@dataclass
class _Descent:
    """The parts of a structure by place: its terms, then the diagonal, then the sparse residual."""

    structure: Structure
    metric: Metric
    seed: int
    found: Parts

    def places(self) -> list[int]:
        """The places of the parts that the structure has."""
        s, count = self.structure, len(self.structure.terms)
        return [*range(count), *([count] if s.diagonal else []), *([count + 1] if s.sparse_blocks else [])]

    def update(self, place: int, rest: Tensor) -> None:
        """Fits one part to `rest` (rows, cols)."""
        s, found = self.structure, self.found
        if place < len(s.terms):
            found.terms[place] = self.metric.term(rest, s.terms[place], found.terms[place], self.seed)
        elif place == len(s.terms):
            found.diagonal = self.metric.diagonal(rest)
        else:
            found.sparse_residual = self.metric.sparse_residual(rest, s.sparse_blocks, s.block, found.sparse_residual)

    def add(self, place: int, rest: Tensor, sign: int) -> None:
        """Adds `sign` times what one part holds to `rest` in place."""
        s, found = self.structure, self.found
        if place < len(s.terms):
            products = found.terms[place]
            assert products is not None
            rest.add_(restore(products.dense(), s.terms[place].factors), alpha=sign)
        elif place == len(s.terms):
            assert found.diagonal is not None
            rest.diagonal().add_(found.diagonal, alpha=sign)
        else:
            assert found.sparse_residual is not None
            values, index = found.sparse_residual
            add_blocks(rest, sign * values, index)

    def greediest(self, entered: list[int], rest: Tensor) -> int:
        """The term that alone takes the most off what is left; diagonal and sparse residual come last, since one that
        enters first holds what the terms could have held for less."""
        waiting = [place for place in self.places() if place not in entered]
        terms = [place for place in waiting if place < len(self.structure.terms)]
        if len(terms) < 2:
            return waiting[0]
        errors = []
        for place in terms:
            self.update(place, rest)
            self.add(place, rest, -1)
            errors.append(self.metric.error(rest))
            self.add(place, rest, 1)
            self.found.terms[place] = None
        return terms[errors.index(min(errors))]
