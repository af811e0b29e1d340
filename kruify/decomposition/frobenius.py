"""The Frobenius norm: every part of a structure has its own best fit to what the other parts leave."""

from __future__ import annotations

from torch import Tensor

from kruify.decomposition.nearest_sum import nearest
from kruify.decomposition.rearrangement import rearrange
from kruify.decomposition.sparse_residual import Blocks, largest_blocks
from kruify.decomposition.svd import improve
from kruify.decomposition.vectors import VectorSum
from kruify.factors import Term


class Frobenius:
    """Fits measured by ||E||_F."""

    def error(self, rest: Tensor) -> float:
        """||rest||^2 in the norm of the fit."""
        return float(rest.square().sum())

    def term(self, rest: Tensor, term: Term, old: VectorSum | None, seed: int) -> VectorSum:
        """The best products for `rest` (rows, cols); `old` are those to improve on, if there are any."""
        tensor = rearrange(rest, term.factors)
        if old is not None and tensor.ndim == 2 and old.rank == term.rank:
            return improve(tensor, old)
        return nearest(tensor, term.rank, seed=seed, start=old, sweeps=200 if old is None else 10)

    def diagonal(self, rest: Tensor) -> Tensor:
        """The best diagonal for `rest`."""
        return rest.diagonal().clone()

    def sparse_residual(self, rest: Tensor, blocks: int, block: int, old: Blocks | None) -> Blocks:
        """The best `blocks` blocks of `block` rows for `rest`; `old` are those it had."""
        return largest_blocks(rest, blocks, block)
