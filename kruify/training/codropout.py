"""Co-matrix dropout: rows of K and rows of S are dropped in training, so that neither leans on the other.

Thakker et al., "Doped Kronecker products", MLSys 2021: while S is still dense it would do all the work, and K would
learn nothing that is of use once S is sparse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kruify.layers.matrix import KroneckerMatrix
from kruify.training.randomness import mix


class CoMatrixDropout:
    """Drops rows with probability `share` and scales the others by 1 / (1 - share), in every matrix that has terms
    and an overlay.

    The product is linear in the first factor of each term and in the overlay's values, so masking these for one step
    and their gradients after it is exact; the layers need to know nothing of it. A row of the first factor is a block
    of rows of K.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.matrices = [
            m for m in model.modules() if isinstance(m, KroneckerMatrix) and m.overlay is not None and len(m.terms)
        ]

    @contextmanager
    def applied(self, *key: int | str) -> Iterator[None]:
        """Inside the block parameters are masked; after it they are as before, and their gradients are masked.

        Args:
            key: what the choice of rows follows from; equal keys drop equal rows on every process.
        """
        generator = torch.Generator().manual_seed(mix("codropout", *key))
        masked = [item for matrix in self.matrices for item in self._masks(matrix, generator)]
        saved = [parameter.detach().clone() for parameter, _ in masked]
        with torch.no_grad():
            for parameter, mask in masked:
                parameter.mul_(mask)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, mask), value in zip(masked, saved, strict=True):
                    parameter.copy_(value)
                    if parameter.grad is not None:
                        parameter.grad.mul_(mask)

    def _masks(self, matrix: KroneckerMatrix, generator: torch.Generator) -> Iterator[tuple[nn.Parameter, Tensor]]:
        overlay = matrix.overlay
        assert overlay is not None
        for term in matrix.term_list():
            factor: Tensor = term.factors[0]
            assert isinstance(factor, nn.Parameter)
            gates, _, rows, _ = factor.shape
            yield factor, self._draw(gates * rows, generator, factor).view(gates, 1, rows, 1)
        mask = self._draw(matrix.gates * matrix.rows, generator, overlay.values)
        yield overlay.values, mask[overlay.coordinates()[0]].view_as(overlay.values)

    def _draw(self, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
        kept = torch.rand(count, generator=generator, device="cpu") >= self.share
        return (kept / (1 - self.share)).to(like.device, like.dtype)
