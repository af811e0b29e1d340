"""Which structure keeps most of a matrix at a given number of parameters: one shape, or a sum of different ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kruify.decomposition.backfitting import Metric, backfit
from kruify.decomposition.fitting import Fit, fit_with
from kruify.decomposition.subspace import SubspaceFrobenius
from kruify.decomposition.weighted import Weighted
from kruify.factors import BLOCK_HEIGHTS, Shape, Structure, Term, balanced, two_factor_shapes

SHAPES_LIMIT = 1 << 19  # entries up to which every pair of shapes is looked at, not only the balanced ones
WEIGHTED_LIMIT, WEIGHTED_LIMIT_LARGE = 2048, 512  # most unknowns of a weighted least-squares step, below that and above
SEARCH_SWEEPS = 2
SCREENED = 16  # shapes whose singular values are computed: those with the highest bounds on their energy
REFINED = 3  # sums of one size that get these sweeps: those that keep the most without
WORTHWHILE = 0.75  # share of the best single shape's energy below which a shape does not enter sums
DIGITS = 6  # of an energy that single precision gives
GRAIN = 1.1  # sums of one shape that are tried to fill a budget: each rank so many times the next
SHORTLIST = 2  # Kronecker shapes that enter sums


@dataclass(frozen=True)
class Mixture:
    """Shares of a budget for the parts of a sum; a diagonal takes its numbers first."""

    low_rank: float = 0.0
    kronecker: float = 0.0
    sparse: float = 0.0
    diagonal: bool = False
    place: int = 0  # of the Kronecker shape in the shortlist


MIXTURES = (
    Mixture(sparse=1.0),
    *(Mixture(share, 1 - share, place=place) for share in (0.5, 0.25, 0.75) for place in range(SHORTLIST)),
    *(Mixture(share, sparse=1 - share) for share in (0.25, 0.5, 0.75)),
    Mixture(kronecker=0.5, sparse=0.5),
    Mixture(1.0, diagonal=True),
    Mixture(0.5, sparse=0.5, diagonal=True),
    Mixture(0.34, 0.33, 0.33),
)


@dataclass(frozen=True)
class ScoredStructure:
    """A structure, the share of the (weighted) energy it keeps, and what kind of sum it is, if it is one."""

    structure: Structure
    energy: float
    mixture: Mixture | None = None

    @property
    def parameters(self) -> int:
        return self.structure.parameters

    @property
    def multiply_adds(self) -> int:
        return self.structure.multiply_adds


class StructureSearch:
    """Looks for structures of one matrix; what is learnt at one budget serves the next.

    Args:
        matrix: (rows, cols), one gate, or `gates` of them stacked.
        metric: the norm, as `metric_of` makes it.
        scaled: every product has a number of its own beside its factors (factors.Structure).
    """

    def __init__(self, matrix: Tensor, metric: Metric, seed: int = 0, gates: int = 1, scaled: bool = False) -> None:
        self.gates, self.scaled = gates, scaled
        self.matrix = matrix.detach().to("cpu", torch.float64)
        self.rows, self.cols = self.matrix.shape
        self.metric, self.seed = metric, seed
        self.total = metric.error(self.matrix)
        self.block = next(b for b in BLOCK_HEIGHTS if self.rows // gates % b == 0)
        slow = isinstance(metric, Weighted) or self.matrix.numel() > SHAPES_LIMIT
        self._shortlist = 1 if slow else SHORTLIST
        # In the weighted norm only a guide: see `spectrum_energy`. Single precision is enough to compare.
        whitened = self.matrix @ metric.root if isinstance(metric, Weighted) else self.matrix
        self.subspace = SubspaceFrobenius((whitened / (self.total**0.5 or 1.0)).float())
        self._searching: tuple[Metric, Tensor, float] = self.subspace, self.subspace.matrix, 1.0
        if isinstance(metric, Weighted):
            self._searching = metric.for_search(), self.matrix, self.total
        self._singles: dict[tuple[int, int | None], list[ScoredStructure]] = {}
        self._fits: dict[tuple[Structure, int], float] = {}

    def energy(self, structure: Structure, sweeps: int = SEARCH_SWEEPS) -> float:
        """The energy that a fit of few sweeps keeps: a bound from below on what a thorough one does."""
        key = structure, sweeps
        if key not in self._fits:
            metric, matrix, total = self._searching
            order = None
            if len(structure.terms) > 1:  # that which alone keeps the most first, as a thorough fit has it
                alone = [self.spectrum_energy(term.factors, term.rank) for term in structure.terms]
                order = sorted(range(len(alone)), key=lambda place: -alone[place])
            lost = backfit(matrix, structure, metric, self.seed, sweeps, order)[1]
            self._fits[key] = 1 - lost / total if self.total > 0 else 1.0
        return self._fits[key]

    def fitted(self, structure: Structure, sweeps: int = 30) -> tuple[Fit, float]:
        """A thorough fit and the share of the energy it keeps in the norm of the search."""
        fit = fit_with(self.metric, self.matrix, structure, seed=self.seed, sweeps=sweeps)
        return fit, 1 - self.metric.error(self.matrix - fit.to_dense()) / self.total if self.total > 0 else 1.0

    def free(self) -> None:
        """Frees what only further searching would use."""
        self.subspace.free()

    def low_rank(self) -> tuple[Shape, Shape]:
        return (self.rows, 1), (1, self.cols)

    def low_rank_energy(self, parameters: int, multiply_adds: int | None = None) -> float:
        """What low rank alone keeps within the budget."""
        term = self._term(self.low_rank(), parameters, multiply_adds)
        return 0.0 if term is None else self.spectrum_energy(term.factors, term.rank)

    @cached_property
    def shapes(self) -> list[tuple[Shape, ...]]:
        """Pairs of factors worth trying, low rank left out: all, or for large matrices those near the balance."""
        pairs: list[tuple[Shape, ...]] = [
            s
            for s in two_factor_shapes(self.rows, self.cols)
            if s not in (self.low_rank(), self.low_rank()[::-1]) and s[0][0] % self.gates == 0
        ]
        if self.matrix.numel() <= SHAPES_LIMIT:
            return pairs
        if isinstance(self.metric, Weighted):  # wide factors would cost the most
            return sorted(pairs, key=lambda s: (sum(p * q for p, q in s), max(q for _, q in s), s))[:3]
        return sorted(pairs, key=lambda s: (sum(p * q for p, q in s), s))[:3]

    def spectrum_energy(self, shapes: tuple[Shape, ...], rank: int) -> float:
        """Energy of the best `rank` products of a pair of shapes: exact in the Frobenius norm and for factors that span
        all columns, elsewhere a guide that treats the weight as if it could be moved into the factors."""
        if self.total == 0:
            return 1.0
        return min(1.0, self.subspace.kept(shapes, rank))

    def singles(self, parameters: int, multiply_adds: int | None = None) -> list[ScoredStructure]:
        """Sums of one shape that fit the budget, the most energy first: low rank, and the shapes that may keep the
        most."""
        key = parameters, multiply_adds
        if key not in self._singles:
            self._singles[key] = self._single_shapes(parameters, multiply_adds)
        return self._singles[key]

    def _single_shapes(self, parameters: int, multiply_adds: int | None) -> list[ScoredStructure]:
        terms = [self._term(shapes, parameters, multiply_adds) for shapes in (self.low_rank(), *self.shapes)]
        fitting = [term for term in terms if term is not None]
        if len(fitting) > SCREENED:
            bounds = {term: self.subspace.bound(term.factors, term.rank) for term in fitting}
            fitting = sorted(fitting, key=lambda term: (term != terms[0], -bounds[term]))[:SCREENED]
        found = [ScoredStructure(self._structure(t), self.spectrum_energy(t.factors, t.rank)) for t in fitting]
        if isinstance(self.metric, Weighted):  # the guide is replaced by the truth for those that matter
            low = [c for c in found if c.structure.terms[0].factors == self.low_rank()]
            rest = sorted((c for c in found if c not in low), key=_order)[: self._shortlist + 1]
            found = low + [ScoredStructure(c.structure, self.energy(c.structure)) for c in rest]
        return sorted(found, key=_order)

    def ranks(self, single: ScoredStructure, most: int) -> list[ScoredStructure]:
        """The shape of a sum of one shape at ranks about `GRAIN` apart, up to so many parameters: where the spectrum
        tells what they keep, which costs nothing."""
        (term,) = single.structure.terms
        if isinstance(self.metric, Weighted) and term.factors != self.low_rank():
            return []
        largest = self._term(term.factors, most, None)
        found, rank = [], largest.rank if largest is not None else 0
        while rank:
            found.append(self._structure(Term(term.factors, rank)))
            rank = min(rank - 1, int(rank / GRAIN))
        return [ScoredStructure(s, self.spectrum_energy(term.factors, s.terms[0].rank)) for s in found]

    def many_factors(self, parameters: int, multiply_adds: int | None = None) -> list[ScoredStructure]:
        """Single products of three factors and more, for budgets below what two factors need."""
        found: list[ScoredStructure] = []
        for count in range(3, max(self.rows, self.cols).bit_length()):
            shapes = balanced(self.rows, self.cols, count, self.gates)
            structure = self._structure(Term(shapes))
            if len(shapes) < 3 or any(c.structure == structure for c in found):
                continue
            if _fits(structure, parameters, multiply_adds):
                found.append(ScoredStructure(structure, self.energy(structure)))
                break  # fewer factors hold more: the first that fits is the one
        return found

    def sums(
        self, parameters: int, multiply_adds: int | None = None, mixtures: Collection[Mixture] = MIXTURES
    ) -> Iterator[tuple[Mixture, Structure]]:
        """Sums of low rank, the best Kronecker shapes, sparse residual and diagonal that share out the budget."""
        singles = self.singles(parameters, multiply_adds)
        kronecker = [
            c.structure.terms[0].factors
            for c in singles
            if c.structure.terms[0].factors != self.low_rank() and c.energy >= WORTHWHILE * singles[0].energy
        ][: self._shortlist]
        seen = set()
        for mixture in mixtures:
            if (mixture.kronecker and mixture.place >= len(kronecker)) or (mixture.diagonal and self.gates > 1):
                continue
            if self._shortlist == 1 and mixture.kronecker and not mixture.sparse and mixture.low_rank != 0.5:
                continue
            side = min(self.rows, self.cols) * mixture.diagonal
            left, adds = parameters - side, None if multiply_adds is None else multiply_adds - side
            wanted: list[tuple[tuple[Shape, ...], float]] = []
            if mixture.low_rank:
                wanted.append((self.low_rank(), mixture.low_rank))
            if mixture.kronecker:
                wanted.append((kronecker[mixture.place], mixture.kronecker))
            terms = [
                self._term(shapes, round(left * share), None if adds is None else round(adds * share))
                for shapes, share in wanted
            ]
            known = [term for term in terms if term is not None]
            if len(known) < len(wanted) or left <= 0:
                continue
            spare = left - sum(t.parameters + t.rank * self.scaled for t in known)
            if adds is not None:
                spare = min(spare, adds - sum(t.multiply_adds for t in known))
            blocks = min(max(0, spare), self.rows * self.cols) // self.block if mixture.sparse else 0
            block = self.block if blocks else 1
            structure = self._structure(*known, diagonal=mixture.diagonal, sparse_blocks=blocks, block=block)
            if (known or blocks or mixture.diagonal) and structure not in seen:
                seen.add(structure)
                yield mixture, structure

    def candidates(
        self, parameters: int, multiply_adds: int | None = None, mixtures: Collection[Mixture] = MIXTURES
    ) -> list[ScoredStructure]:
        """Everything worth comparing at one budget, the most energy first; of the sums, these kinds."""
        found = self.singles(parameters, multiply_adds)[: SHORTLIST + 1]
        sums = [*self.sums(parameters, multiply_adds, mixtures)]
        rough = {s: self.energy(s, 0) if len(sums) > REFINED else 0.0 for _, s in sums}
        refined = sorted(rough, key=lambda s: -rough[s])[:REFINED]
        found += [ScoredStructure(s, self.energy(s) if s in refined else rough[s], mixture) for mixture, s in sums]
        if not any(c.structure.terms for c in found):
            found += self.many_factors(parameters, multiply_adds)
        return sorted(found, key=_order)

    def _term(self, shapes: tuple[Shape, ...], parameters: int, multiply_adds: int | None) -> Term | None:
        one = Term(shapes)
        rank = parameters // (one.parameters + self.scaled)
        if multiply_adds is not None:
            rank = min(rank, multiply_adds // one.multiply_adds)
        sides = sorted(p * q for p, q in shapes)
        rank = min(rank, math.prod(sides[:-1]))  # more terms than that add nothing
        if isinstance(self.metric, Weighted) and all(q < self.cols for _, q in shapes):
            limit = WEIGHTED_LIMIT if self.matrix.numel() <= SHAPES_LIMIT else WEIGHTED_LIMIT_LARGE
            rank = min(rank, limit // max(q for _, q in shapes))
        return Term(shapes, rank) if rank >= 1 else None

    def _structure(self, *terms: Term, **rest: Any) -> Structure:
        return Structure(self.rows, self.cols, terms, scaled=self.scaled, gates=self.gates, **rest)


def _fits(structure: Structure, parameters: int, multiply_adds: int | None) -> bool:
    return structure.parameters <= parameters and (multiply_adds is None or structure.multiply_adds <= multiply_adds)


def _order(candidate: ScoredStructure) -> tuple[float, int, str]:
    """Most energy first; where it is equal to rounding, the cheaper, then the name: the same choice everywhere."""
    return -round(candidate.energy, DIGITS), candidate.multiply_adds, str(candidate.structure)
