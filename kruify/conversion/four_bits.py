"""Rounding to four bits that knows what a matrix is applied to: of dense weights, and of low rank, whose left factor is
fitted once more to what the rounded right one gives.

What is rounded so is what storing it as int4 keeps. Eight bits lose too little to mend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.layers import KroneckerMatrix, KroneckerTerm
from kruify.quantization import compensated, in_pairs, quantize_rows, round_to, row_dims

RIDGE = 1e-4  # of the mean of the diagonal, towards the factor from before: products may all but coincide


def round_weight(weight: Tensor, second: Tensor) -> Tensor:
    """A dense weight (rows, cols), in its dtype, rounded for inputs of these second moments (cols, cols); one whose
    rows are not for four bits as it is."""
    if not in_pairs(weight.shape, (1,)):
        return weight
    return compensated(weight, second, quantize_rows(weight, (1,), "int4")[1]).to(weight)


@torch.no_grad()
def round_matrix(matrix: KroneckerMatrix, dense: Tensor, second: Tensor) -> None:
    """Rounds the factors of a matrix in place, where they are of low rank or dense; others are left as they are.

    Args:
        dense: (gates * rows, cols), what it stands for.
        second: (cols, cols) moments of what it is applied to.
    """
    terms = matrix.term_list()
    alone = sum(len(term.gates) for term in terms) == matrix.gates  # one term a gate
    if matrix.diagonal is not None or matrix.overlay is not None or not alone:
        return
    gates, second = dense.cpu().double().reshape(matrix.gates, matrix.rows, matrix.cols), second.cpu().double()
    for term in terms:
        if term.scale is None:
            _round_term(term, gates[list(term.gates)], second)


def _round_term(term: KroneckerTerm, dense: Tensor, second: Tensor) -> None:
    """`dense`: (gates, rows, cols) of the gates of the term."""
    factors, _ = term.held()
    cols = dense.shape[2]
    if len(factors) == 1 and term.term.rank == 1:
        (whole,) = factors
        whole.copy_(round_weight(whole.reshape(-1, cols), second).view_as(whole))
    if len(factors) != 2 or factors[0].shape[3] > 1 or factors[1].shape[2] > 1:
        return
    left, right = factors  # (gates, rank, rows, 1), (gates or 1, rank, 1, cols)
    right.copy_(round_weight(right.reshape(-1, cols), second).view_as(right))
    if not in_pairs(right.shape, rows := row_dims(right.shape, factor=True)):
        right.copy_(round_to(right, "int8", rows))
    shared = len(right) < len(left)
    dims = row_dims(left.shape, factor=True, shared=shared)
    if shared:
        dense = dense.reshape(1, -1, cols)
    before = left.cpu().double().transpose(1, 2).reshape(*dense.shape[:2], -1)  # (gates or 1, rows, rank)
    found = []
    for target, start, below in zip(dense, before, right[:, :, 0].cpu().double(), strict=True):
        moments = below @ second @ below.T  # of what the left factor is applied to
        ridge = RIDGE * moments.diagonal().mean().clamp_min(1e-30) * torch.eye(len(moments), dtype=moments.dtype)
        wrong = (target - start @ below) @ second @ below.T
        found.append((start + torch.linalg.solve(moments + ridge, wrong.T).T, moments))
    fitted = torch.stack([part for part, _ in found])

    def as_left(parts: Tensor) -> Tensor:
        return parts.reshape(len(left), left.shape[2], -1).transpose(1, 2)[..., None].to(left.dtype)

    left.copy_(as_left(fitted))
    if in_pairs(left.shape, dims):
        scales = quantize_rows(left, dims, "int4")[1].reshape(len(dense), 1, -1)
        parts = [compensated(part, moments, scale) for (part, moments), scale in zip(found, scales, strict=True)]
        left.copy_(as_left(torch.stack(parts)))
