"""A sum of Kronecker products as an operator: the readable reference that every kernel is compared with.

The factors of one term are stacked: `factors[f]` has shape (gates, rank, P_f, Q_f) and the term stands for

    W[g] = sum_r scale[g, r] * factors[0][g, r] (x) factors[1][g, r] (x) ...        (prod P_f, prod Q_f)

Gates may share a factor: it is then (1, rank, P_f, Q_f).

A product with a vector never forms W: with the vector seen as a tensor of shape (Q_0, Q_1, ...), factor f acts on
mode f alone (Van Loan, "The ubiquitous Kronecker product", 2000, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kruify.factors import contraction_order


def to_dense(
    factors: Sequence[Tensor],  # each (gates, rank, P_f, Q_f)
    scale: Tensor | None = None,  # (gates, rank)
) -> Tensor:  # (gates, rows, cols)
    """The dense matrices that the stacked factors stand for, one per gate."""
    factors = _repeated(factors)
    product = factors[0] if scale is None else factors[0] * scale[..., None, None]
    if len(factors) == 1:
        return product.sum(dim=1)
    for factor in factors[1:-1]:
        product = kron(product, factor)
    # The last product and the sum over terms are one batched GEMM: out[g, mp, nq] = sum_r a[g, r, mn] b[g, r, pq].
    last = factors[-1]
    gates, rank, m, n = product.shape
    p, q = last.shape[-2:]
    flat = product.reshape(gates, rank, m * n).transpose(1, 2) @ last.reshape(gates, rank, p * q)
    return flat.reshape(gates, m, n, p, q).permute(0, 1, 3, 2, 4).reshape(gates, m * p, n * q)


def _repeated(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    gates = max(factor.shape[0] for factor in factors)
    return [factor.expand(gates, -1, -1, -1) for factor in factors]


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker product of the last two dimensions: (..., m, n), (..., p, q) -> (..., mp, nq)."""
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.reshape(*product.shape[:-4], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])


def matmul(
    x: Tensor,  # (..., cols)
    factors: Sequence[Tensor],  # each (gates, rank, P_f, Q_f)
    scale: Tensor | None = None,  # (gates, rank)
) -> Tensor:  # (..., gates, rows)
    """W[g] @ x for every gate, without forming W: one mode product per factor, the cheapest order first."""
    factors = _repeated(factors)
    gates, rank = factors[0].shape[:2]
    shapes = [(f.shape[-2], f.shape[-1]) for f in factors]
    sizes = [q for _, q in shapes]
    batch = x.shape[:-1]
    y = x.reshape(-1, 1, 1, x.shape[-1]).expand(-1, gates, rank, -1)
    for f in contraction_order(shapes):
        before, after = math.prod(sizes[:f]), math.prod(sizes[f + 1 :])
        modes = y.reshape(y.shape[0], gates, rank, before, sizes[f], after)
        y = torch.einsum("grpq,bgrmqs->bgrmps", factors[f], modes)
        sizes[f] = shapes[f][0]
    y = y.reshape(y.shape[0], gates, rank, math.prod(sizes))
    y = y.sum(dim=2) if scale is None else torch.einsum("bgrn,gr->bgn", y, scale)
    return y.reshape(*batch, gates, y.shape[-1])
