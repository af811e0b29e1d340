"""Puts the numbers of a decomposition into a `KroneckerMatrix`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kruify.decomposition.fitting import Fit, Products
from kruify.errors import UsageError
from kruify.layers.matrix import KroneckerMatrix, group_terms


@torch.no_grad()
def assign(matrix: KroneckerMatrix, fits: Sequence[Fit]) -> None:
    """Copies one `Fit` per gate, or that of all gates stacked, into the parameters, in place.

    Where the structure is scaled, the scale stays separate and the factors keep the norms of orthogonal ones; else it
    is folded into the factors in equal shares. A product with scale 0 gets a zero first factor and keeps the others,
    so that training can still use it.

    Raises:
        UsageError: the fits are not of the structures of the matrix.
    """
    if tuple(f.structure for f in fits) != matrix.structures:
        raise UsageError("the fits were made for other structures than the gates of this matrix have")
    groups = group_terms(matrix.structures)
    for module, ((term, scaled, occurrence), gates) in zip(matrix.term_list(), groups.items(), strict=True):
        for row, gate in enumerate(gates):
            places = [i for i, t in enumerate(fits[gate].structure.terms) if t == term]
            products = fits[gate].terms[places[occurrence]]
            scale, factors = products if scaled else _folded(products)
            for parameter, factor in zip(module.factors, factors, strict=True):
                # (gates, rank, P, Q): the one fit of stacked gates holds the rows of them all
                own = parameter if module.stacked else parameter[row : row + 1]
                own.copy_(factor.reshape(term.rank, len(own), *own.shape[2:]).transpose(0, 1))
            if module.scale is not None:
                module.scale[row].copy_(scale)
    if matrix.diagonal is not None:
        for row, gate in enumerate(matrix.diagonal_gates):
            diagonal = fits[gate].diagonal
            assert diagonal is not None
            matrix.diagonal[row].copy_(diagonal)
    if matrix.overlay is not None:
        parts = [(gate, f.sparse_residual) for gate, f in enumerate(fits) if f.sparse_residual is not None]
        offset = torch.tensor([matrix.structures[0].rows, 0])
        # Sorted within a gate, and gates follow each other in rows: sorted over all.
        matrix.overlay.index.copy_(torch.cat([index + gate * offset for gate, (_, index) in parts]))
        matrix.overlay.values.copy_(torch.cat([values for _, (values, _) in parts]))


def _folded(products: Products) -> Products:
    scale, factors = products
    share = scale ** (1 / len(factors))
    folded = [f * share[:, None, None] for f in factors]
    dead = scale == 0
    for before, after in zip(factors[1:], folded[1:], strict=True):
        after[dead] = before[dead]
    return torch.ones_like(scale), folded
