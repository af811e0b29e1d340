"""Backfitting: every part of a structure in turn is fitted to what the others leave (hKoPA: Cai, Chen & Xiao 2022)."""

from __future__ import annotations

from collections.abc import Sequence
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
TOLERANCE = 3e-5  # of the remaining error, per round
Metric = Frobenius | Weighted
"""How each part of a structure is fitted to what the other parts leave, and how that is measured."""


@dataclass
class Parts:
    """What the parts of a structure hold; None for one that has not been fitted, or is not part of it."""

    terms: list[VectorSum | None]
    diagonal: Tensor | None = None
    sparse_residual: Blocks | None = None


def backfit(
    w: Tensor, structure: Structure, metric: Metric, seed: int, sweeps: int, order: Sequence[int] | None = None
) -> tuple[Parts, float]:
    """Sums have local optima, and the order in which the parts enter decides which is found: a thorough fit tries the
    greedy order and its reverse.

    Args:
        w: (rows, cols).
        sweeps: at most so many rounds over the parts.
        order: places of the terms in the order in which they enter; None is the greedy one.

    Returns:
        what was found, and its squared error.
    """
    best = _Descent(w, structure, metric, seed)
    best.enter(order)
    best.rounds(sweeps)
    if len(best.places) > 1 and sweeps >= THOROUGH and w.numel() <= LARGE:
        other = _Descent(w, structure, metric, seed)
        other.enter(best.entered[::-1])
        other.rounds(sweeps)
        best = min(best, other, key=lambda descent: descent.error)
    return best.found, best.error


class _Descent:
    """One start and its rounds.

    Attributes:
        places: of the parts that the structure has: its terms, then the diagonal, then the sparse residual.
        entered: places in the order in which they entered.
        rest: (rows, cols), what the parts leave, and error, its squared norm.
    """

    def __init__(self, w: Tensor, structure: Structure, metric: Metric, seed: int) -> None:
        self.structure, self.metric, self.seed = structure, metric, seed
        self.rest = w.clone()
        self.total = self.error = metric.error(w)
        self.found = Parts([None] * len(structure.terms))
        count = len(structure.terms)
        self.places = [
            *range(count), *([count] if structure.diagonal else []), *([count + 1] if structure.sparse_blocks else [])
        ]  # fmt: skip
        self.entered: list[int] = []
        self.settled = len(self.places) == 1

    def enter(self, order: Sequence[int] | None) -> None:
        """Fits every part to what those before it leave; parts that `order` does not name come last."""
        waiting = [*(order or ()), *(place for place in self.places if place not in (order or ()))]
        while waiting:
            place = waiting[0] if order is not None else self._greediest(waiting)
            waiting.remove(place)
            if not self._is_fitted(place):
                self._update(place)
            self._add(place, -1)
            self.entered.append(place)
        self.error = self.metric.error(self.rest)

    def rounds(self, most: int) -> None:
        """Fits every part again to what the others leave, at most so often, until that stops helping."""
        for _ in range(most):
            if self.settled:
                return
            before = self.error
            for place in self.places:
                self._add(place, 1)
                self._update(place)
                self._add(place, -1)
            self.error = self.metric.error(self.rest)
            self.settled = before - self.error <= TOLERANCE * self.error or self.error <= 1e-28 * self.total

    def _update(self, place: int) -> None:
        """Fits one part to the rest."""
        s, found = self.structure, self.found
        if place < len(s.terms):
            found.terms[place] = self.metric.term(self.rest, s.terms[place], found.terms[place], self.seed)
        elif place == len(s.terms):
            found.diagonal = self.metric.diagonal(self.rest)
        else:
            found.sparse_residual = self.metric.sparse_residual(
                self.rest, s.sparse_blocks, s.block, found.sparse_residual
            )

    def _add(self, place: int, sign: int) -> None:
        """Adds `sign` times what one part holds to the rest."""
        s, found = self.structure, self.found
        if place < len(s.terms):
            products = found.terms[place]
            assert products is not None
            self.rest.add_(restore(products.dense(), s.terms[place].factors), alpha=sign)
        elif place == len(s.terms):
            assert found.diagonal is not None
            self.rest.diagonal().add_(found.diagonal, alpha=sign)
        else:
            assert found.sparse_residual is not None
            values, index = found.sparse_residual
            add_blocks(self.rest, sign * values, index)

    def _is_fitted(self, place: int) -> bool:
        return place < len(self.structure.terms) and self.found.terms[place] is not None

    def _greediest(self, waiting: list[int]) -> int:
        """The term that alone takes the most off what is left, fitted; diagonal and sparse residual come last, since
        one that enters first holds what the terms could have held for less."""
        terms = [place for place in waiting if place < len(self.structure.terms)]
        if len(terms) < 2:
            return waiting[0]
        errors, fits = [], []
        for place in terms:
            self._update(place)
            self._add(place, -1)
            errors.append(self.metric.error(self.rest))
            self._add(place, 1)
            fits.append(self.found.terms[place])
            self.found.terms[place] = None
        best = errors.index(min(errors))
        self.found.terms[terms[best]] = fits[best]
        return terms[best]
