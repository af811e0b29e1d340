"""The nearest sum of products of vectors to a rearranged matrix: SVD for two modes, SVDs and ALS for more."""

from __future__ import annotations

import torch
from torch import Tensor

from kruify.decomposition.als import refine
from kruify.decomposition.successive import higher_order_svd, successive_svd
from kruify.decomposition.svd import truncated_svd
from kruify.decomposition.vectors import VectorSum

RESTARTS = 2  # random starts beside the successive SVDs and the HOSVD, for three factors and more
RESTART_LIMIT = 1 << 20  # entries above which only the two informed starts are run


def nearest(
    tensor: Tensor,
    rank: int,
    *,
    seed: int = 0,
    start: VectorSum | None = None,
    restarts: int | None = None,
    sweeps: int = 200,
) -> VectorSum:
    """The sum of at most `rank` products of vectors nearest to `tensor` in the Frobenius norm.

    Two modes: the truncated SVD, exactly optimal (Eckart-Young). More: NP-hard in general; the best of several ALS
    runs, never worse than the successive SVDs, and exact where these are (as many terms as they need).

    Args:
        tensor: (mode 0, mode 1, ...), float64.
        rank: terms asked for; fewer are returned where fewer are exact.
        seed: of the random starts.
        start: refine this sum and try no other start (backfitting).
        restarts: number of random starts.
        sweeps: ALS sweeps of each run; 0 gives the best of the starts.
    """
    if tensor.ndim == 1:
        norm = tensor.norm().reshape(1)
        return VectorSum(norm, [(tensor / norm if norm > 0 else tensor)[:, None]])
    if tensor.ndim == 2:
        return truncated_svd(tensor, rank)
    if start is not None:
        return refine(tensor, start.padded(rank), sweeps=sweeps)
    best = successive_svd(tensor, rank)
    if best.rank < rank:  # the tree was exhausted: exact
        return best
    total = float(tensor.square().sum())
    starts = [higher_order_svd(tensor, rank)]
    if restarts is None:
        restarts = RESTARTS if tensor.numel() <= RESTART_LIMIT else 0
    generator = torch.Generator().manual_seed(seed)
    starts += [_random_start(tensor, rank, generator) for _ in range(restarts)]
    best = refine(tensor, best, sweeps=sweeps)
    error = best.distance(tensor)
    for candidate in starts:
        if error <= 1e-24 * total:
            break
        refined = refine(tensor, candidate, sweeps=sweeps)
        if (other := refined.distance(tensor)) < error:
            best, error = refined, other
    return best


def _random_start(tensor: Tensor, rank: int, generator: torch.Generator) -> VectorSum:
    vectors = [torch.randn(n, rank, dtype=tensor.dtype, generator=generator) for n in tensor.shape]
    units = [v / v.norm(dim=0) for v in vectors]
    weight = tensor.new_full((rank,), float(tensor.norm()) / tensor.numel() ** 0.5)
    return VectorSum(weight, units)
