"""Alternating least squares on a sum of products of vectors (CP form), every mode in turn, all terms jointly."""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.decomposition.vectors import VectorSum, khatri_rao, normalised

PROXIMAL = 1e-12  # relative; keeps the normal equations solvable when terms become parallel
TENSORLY_MODES, TENSORLY_ENTRIES = 3, 1 << 18  # up to these: its sweep copies the tensor once per mode


def refine(tensor: Tensor, start: VectorSum, *, sweeps: int = 200, tolerance: float = 1e-10) -> VectorSum:
    """Lowers ||tensor - sum||_F from `start`, never raising it.

    Three modes of up to 512x512 entries by tensorly's `parafac`, at most 1.3 times our time; all others by sweeps that
    share partial contractions. Both keep the same energy (section "many" of benchmarks/decompose.md).

    Args:
        tensor: (mode 0, mode 1, ...).
        start: the sum to improve; terms of weight 0 stay out of it.
        sweeps: at most so many passes over all modes.
        tolerance: stops when a sweep gains less than this share of ||tensor||^2.
    """
    live = start.weight > 0
    if tensor.ndim < 2 or not sweeps or not bool(live.any()):
        return start
    # The weight is shared out evenly, so that no mode dwarfs the regularisation of another.
    vectors = [v[:, live] * start.weight[live] ** (1 / tensor.ndim) for v in start.vectors]
    small = tensor.ndim <= TENSORLY_MODES and tensor.numel() <= TENSORLY_ENTRIES
    descend = by_tensorly if small else by_shared_contractions
    found = descend(tensor, vectors, sweeps, tolerance).padded(start.rank)
    return found if found.distance(tensor) <= start.distance(tensor) else start


def by_tensorly(tensor: Tensor, vectors: list[Tensor], sweeps: int, tolerance: float) -> VectorSum:
    """`tensorly.decomposition.parafac` from the given vectors, one (mode size, rank) per mode."""
    import tensorly
    from tensorly.decomposition import parafac

    ridge = PROXIMAL * float(_normal([v.T @ v for v in vectors], 0).diagonal().mean())
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        # Its tolerance is of the error, ours of the squared error, twice as large where little is kept.
        start, rank = tensorly.cp_tensor.CPTensor((None, vectors)), vectors[0].shape[1]
        found = parafac(tensor, rank, init=start, n_iter_max=sweeps, tol=tolerance / 2, l2_reg=ridge)
    return normalised(found.factors)


def by_shared_contractions(tensor: Tensor, vectors: list[Tensor], sweeps: int, tolerance: float) -> VectorSum:
    """One sweep costs two passes over the tensor whatever the number of modes: partial contractions are shared along a
    binary tree of modes (Phan, Tichavsky & Cichocki, "Fast alternating LS algorithms for high order CP", 2013)."""
    total = float(tensor.square().sum())
    best, best_error, error = normalised(vectors), float("inf"), float("inf")
    for _ in range(sweeps):
        state = _State(vectors)
        _sweep(tensor[..., None], list(range(tensor.ndim)), state)
        current = normalised(state.vectors)
        # A difference of large numbers: it tells when to stop; the caller compares what was found directly.
        before, error = error, float(total + current.gram().sum() - 2 * state.inner)
        vectors = [v * current.weight ** (1 / tensor.ndim) for v in current.vectors]
        if error < best_error:
            best, best_error = current, error
        if not before - error > tolerance * total:
            break
    return best


def _normal(grams: list[Tensor], mode: int) -> Tensor:
    """The matrix of the normal equations of one mode: (rank, rank)."""
    normal = torch.ones_like(grams[0])
    for other, gram in enumerate(grams):
        if other != mode:
            normal = normal * gram
    return normal


class _State:
    def __init__(self, vectors: list[Tensor]) -> None:
        self.vectors = list(vectors)
        self.grams = [v.T @ v for v in vectors]
        self.inner = 0.0  # <tensor, sum>, known after the last mode of a sweep

    def update(self, mode: int, projected: Tensor) -> None:
        """Solves for one mode; `projected` is the tensor contracted with the vectors of all others, (n, rank)."""
        normal = _normal(self.grams, mode)
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
