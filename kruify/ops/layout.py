"""The static half of a Kronecker matrix, which stage belongs to which term and gate, as an operator's `int[]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kruify.errors import UsageError
from kruify.ops import tracing


@dataclass(frozen=True)
class TermLayout:
    """One term: its gates, and how many stages (merged factors) it takes from the flat stage list."""

    stages: int
    gates: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Static description of a (gates * rows, cols) sum of Kronecker products.

    As `int[]`: gates, rows, cols, number of diagonal gates, those gates, number of terms, and for each term its number
    of stages, its number of gates, those gates.
    """

    gates: int
    rows: int
    cols: int
    diagonal_gates: tuple[int, ...]
    terms: tuple[TermLayout, ...]

    def encode(self) -> list[int]:
        code = [self.gates, self.rows, self.cols, len(self.diagonal_gates), *self.diagonal_gates, len(self.terms)]
        for term in self.terms:
            code += [term.stages, len(term.gates), *term.gates]
        return code


@tracing.constant  # torch.compile cannot look into it
def decode(code: Sequence[int]) -> Layout:
    """The layout that `encode` wrote.

    Raises:
        UsageError: the numbers are not a layout.
    """
    return _decode(tuple(code))


@lru_cache(maxsize=256)
def _decode(code: tuple[int, ...]) -> Layout:
    rest = iter(code)
    try:
        gates, rows, cols = next(rest), next(rest), next(rest)
        diagonal = tuple(next(rest) for _ in range(next(rest)))
        terms = []
        for _ in range(next(rest)):
            stages, count = next(rest), next(rest)
            terms.append(TermLayout(stages, tuple(next(rest) for _ in range(count))))
    except (StopIteration, RuntimeError):
        raise UsageError(f"{list(code)} ends early: it is no operator layout") from None
    layout = Layout(gates, rows, cols, diagonal, tuple(terms))
    groups = [diagonal, *(t.gates for t in terms)]
    if next(rest, None) is not None or any(not 0 <= g < gates for group in groups for g in group):
        raise UsageError(f"{list(code)} is no operator layout")
    return layout
