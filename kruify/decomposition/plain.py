"""The Frobenius norm: every part of a structure has its own best fit to what the other parts leave."""

from __future__ import annotations

from torch import Tensor

from kruify.decomposition.nearest import nearest
from kruify.decomposition.overlay import best_overlay
from kruify.decomposition.rearrange import rearrange
from kruify.decomposition.vectors import VectorSum
from kruify.factors import Term


class Plain:
    """Fits measured by ||E||_F."""

    def error(self, rest: Tensor) -> float:
        """||rest||^2 in the norm of the fit."""
        return float(rest.square().sum())

    def term(self, rest: Tensor, term: Term, old: VectorSum | None, seed: int) -> VectorSum:
        """The best products for `rest` (rows, cols); `old` are those to improve on, if there are any."""
        return nearest(
            rearrange(rest, term.factors), term.rank, seed=seed, start=old, sweeps=200 if old is None else 10
        )

    def diagonal(self, rest: Tensor) -> Tensor:
        """The best diagonal for `rest`."""
        return rest.diagonal().clone()

    def overlay(self, rest: Tensor, blocks: int, block: int, old: Tensor | None) -> tuple[Tensor, Tensor]:
        """The best overlay for `rest`; `old` (blocks, 2) is the index it had."""
        return best_overlay(rest, blocks, block)
