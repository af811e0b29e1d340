"""Nearest Kronecker products of orthogonal (complex: unitary) factors, by alternating Procrustes.

With all factors but one given, Re<W, Q_0 (x) ... (x) Q_F> is linear in the one, and its maximum over matrices with
orthonormal columns is the polar factor of the partial contraction (Schoenemann 1966). Each step can only raise it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kruify.decomposition.nearest import nearest
from kruify.decomposition.overlay import best_overlay
from kruify.decomposition.rearrange import rearrange
from kruify.decomposition.vectors import VectorSum
from kruify.errors import UnsupportedError
from kruify.factors import Shape, Term

SWEEPS, TOLERANCE, RESTARTS = 50, 1e-10, 3


class Unitary:
    """Fits measured by ||E||_F whose products are a positive scale times semi-orthogonal factors."""

    def error(self, rest: Tensor) -> float:
        return float(rest.abs().square().sum())

    def term(self, rest: Tensor, term: Term, old: VectorSum | None, seed: int) -> VectorSum:
        """Products one after the other, then each again to what the others leave."""
        tensor = rearrange(rest, term.factors)
        parts = [] if old is None else [VectorSum(old.weight[r : r + 1], _column(old, r)) for r in range(old.rank)]
        left = tensor.clone() if old is None else tensor - old.dense()
        for r in range(term.rank if old is None else 0):
            parts.append(_one(left, term.factors, None, seed + r))
            left -= parts[-1].dense()
        for _ in range(10 if term.rank > 1 else 0):
            for r, part in enumerate(parts):
                left += part.dense()
                parts[r] = _one(left, term.factors, part, seed)
                left -= parts[r].dense()
        return _joined(parts)

    def diagonal(self, rest: Tensor) -> Tensor:
        return rest.diagonal().clone()

    def overlay(self, rest: Tensor, blocks: int, block: int, old: Tensor | None) -> tuple[Tensor, Tensor]:
        if rest.is_complex():
            raise UnsupportedError("an overlay of a complex matrix is not supported", hint="Leave the overlay out")
        return best_overlay(rest, blocks, block)


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if wide) to (p, q): U V^H of its SVD."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    factor: Tensor = left @ right
    return factor


def _one(tensor: Tensor, shapes: tuple[Shape, ...], old: VectorSum | None, seed: int) -> VectorSum:
    generator = torch.Generator().manual_seed(seed)
    if old is not None:
        starts = [[v[:, 0].reshape(s) for v, s in zip(old.vectors, shapes, strict=True)]]
    else:
        starts = [[torch.randn(s, dtype=tensor.dtype, generator=generator) for s in shapes] for _ in range(RESTARTS)]
        if not tensor.is_complex() and bool(tensor.any()):
            free = nearest(tensor, 1, seed=seed, restarts=0)
            starts.insert(0, [v[:, 0].reshape(s) for v, s in zip(free.vectors, shapes, strict=True)])
    best, best_score = None, -math.inf
    for start in starts:
        factors, score = _procrustes(tensor, [polar(f) for f in start])
        if best is None or score > best_score * (1 + 1e-12):
            best, best_score = factors, score
    assert best is not None
    # ||product||_F^2 = prod min(p, q), so the best scale is the score over that; vectors here have norm 1.
    norm = math.prod(min(s) for s in shapes) ** 0.5
    weight = torch.tensor([best_score / norm], dtype=torch.float64)
    return VectorSum(weight, [f.reshape(-1, 1) / min(f.shape) ** 0.5 for f in best])


def _procrustes(tensor: Tensor, factors: list[Tensor]) -> tuple[list[Tensor], float]:
    score = 0.0
    for _ in range(SWEEPS):
        before = score
        for f in range(len(factors)):
            partial = tensor
            for g in reversed(range(len(factors))):
                if g != f:
                    partial = torch.tensordot(partial, factors[g].reshape(-1).conj(), dims=([g], [0]))
            partial = partial.reshape(factors[f].shape)
            factors[f] = polar(partial)
            score = float((factors[f].conj() * partial).sum().real)
        if score - before <= TOLERANCE * abs(score):
            break
    return factors, score


def _column(vectors: VectorSum, r: int) -> list[Tensor]:
    return [v[:, r : r + 1] for v in vectors.vectors]


def _joined(parts: list[VectorSum]) -> VectorSum:
    modes = len(parts[0].vectors)
    return VectorSum(
        torch.cat([p.weight for p in parts]), [torch.cat([p.vectors[m] for p in parts], dim=1) for m in range(modes)]
    )
