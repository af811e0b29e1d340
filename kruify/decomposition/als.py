"""Alternating least squares on a sum of products of vectors (CP form), every mode in turn, all terms jointly."""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.decomposition.vectors import VectorSum, khatri_rao, normalised

PROXIMAL = 1e-12  # relative; keeps the normal equations solvable when terms become parallel, and keeps the descent


def refine(tensor: Tensor, start: VectorSum, *, sweeps: int = 200, tolerance: float = 1e-10) -> VectorSum:
    """Lowers ||tensor - sum||_F from `start`, never raising it.

    Args:
        tensor: (mode 0, mode 1, ...).
        start: the sum to improve; terms of weight 0 stay out of it.
        sweeps: at most so many passes over all modes.
        tolerance: stops when a sweep gains less than this share of ||tensor||^2.

    One sweep costs two passes over the tensor whatever the number of modes: partial contractions are shared along a
    binary tree of modes (Phan, Tichavsky & Cichocki, "Fast alternating LS algorithms for high order CP", 2013).
    """
    live = start.weight > 0
    if len(start.vectors) < 2 or not bool(live.any()):
        return start
    total = float(tensor.square().sum())
    # The weight is shared out evenly, so that no mode dwarfs the proximal term of another.
    share = start.weight[live] ** (1 / len(start.vectors))
    state = _State([v[:, live] * share for v in start.vectors])
    best, best_error = start, _error(total, tensor, start)
    error = best_error
    for _ in range(sweeps):
        _sweep(tensor[..., None], list(range(len(state.vectors))), state)
        current = normalised(state.vectors)
        before, error = error, float(total + current.gram().sum() - 2 * state.inner)
        if error < best_error:
            best, best_error = current, error
        if not before - error > tolerance * total:
            break
        share = current.weight ** (1 / len(current.vectors))
        state = _State([v * share for v in current.vectors])
    # `error` is a difference of large numbers; the gain is taken only if it is there when computed directly.
    padded = best.padded(start.rank)
    return padded if _residual(tensor, padded) <= _residual(tensor, start) else start


class _State:
    def __init__(self, vectors: list[Tensor]) -> None:
        self.vectors = vectors
        self.grams = [v.T @ v for v in vectors]
        self.inner = 0.0  # <tensor, sum>, known after the last mode of a sweep

    def update(self, mode: int, projected: Tensor) -> None:
        """Solves for one mode; `projected` is the tensor contracted with the vectors of all others, (n, rank)."""
        normal = torch.ones_like(self.grams[0])
        for other, gram in enumerate(self.grams):
            if other != mode:
                normal = normal * gram
        ridge = PROXIMAL * normal.diagonal().mean()
        lhs = normal + ridge * torch.eye(len(normal), dtype=normal.dtype)
        rhs = projected + ridge * self.vectors[mode]
        factor, info = torch.linalg.cholesky_ex(lhs)
        if int(info) == 0:
            solved = torch.cholesky_solve(rhs.T, factor).T
        else:
            solved = torch.linalg.lstsq(lhs, rhs.T, driver="gelsd").solution.T
        self.vectors[mode] = solved
        self.grams[mode] = solved.T @ solved
        self.inner = float((projected * solved).sum())


def _sweep(partial: Tensor, modes: list[int], state: _State) -> None:
    """Updates `modes` in order; `partial` has those modes and, last, the rank (1 at the root)."""
    if len(modes) == 1:
        state.update(modes[0], partial.expand(-1, state.grams[0].shape[0]))
        return
    half = len(modes) // 2
    left, right = modes[:half], modes[half:]
    _sweep(_contract(partial, half, [state.vectors[m] for m in right], last=True), left, state)
    _sweep(_contract(partial, half, [state.vectors[m] for m in left], last=False), right, state)


def _contract(partial: Tensor, half: int, vectors: list[Tensor], *, last: bool) -> Tensor:
    """Contracts the modes after (last) or before the first `half` ones with `vectors`."""
    sizes = partial.shape[:-1]
    rows = int(torch.Size(sizes[:half]).numel())
    product = khatri_rao(vectors)
    kept = sizes[:half] if last else sizes[half:]
    if partial.shape[-1] == 1:  # the tensor itself: one matrix product for all terms
        matrix = partial.reshape(rows, -1)
        out = matrix @ product if last else matrix.T @ product
    else:
        cube = partial.reshape(rows, -1, partial.shape[-1])
        out = torch.einsum("mnr,nr->mr", cube, product) if last else torch.einsum("mnr,mr->nr", cube, product)
    return out.reshape(*kept, product.shape[1])


def _error(total: float, tensor: Tensor, current: VectorSum) -> float:
    return float(total + current.gram().sum() - 2 * _inner(tensor, current))


def _inner(tensor: Tensor, current: VectorSum) -> Tensor:
    half = max(1, len(current.vectors) // 2)
    left, right = khatri_rao(current.vectors[:half]), khatri_rao(current.vectors[half:])
    return ((tensor.reshape(left.shape[0], -1) @ right) * left * current.weight).sum()


def _residual(tensor: Tensor, current: VectorSum) -> float:
    return float((tensor - current.dense()).square().sum())
