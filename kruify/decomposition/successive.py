"""Starts for the sum of products of many factors: successive SVDs (TKPSVD) and the higher-order SVD.

Both write the tensor as a sum of mutually orthogonal products of vectors, so keeping the heaviest `rank` of them is
the best that can be done among them, and keeping all of them is exact.
"""

from __future__ import annotations

import heapq
import itertools

import torch
from torch import Tensor

from kruify.decomposition.svd import eigh
from kruify.decomposition.vectors import NUMERICALLY_ZERO, VectorSum


def successive_svd(tensor: Tensor, rank: int) -> VectorSum:
    """The `rank` heaviest terms of the successive SVDs of a tensor (TKPSVD, Batselier & Wong 2015, algorithm 1).

    The first mode is split off by an SVD, each right vector (a tensor of one mode less) is split again, and so on: a
    tree whose leaves are orthogonal products. A branch weighs at least as much as each of its leaves, so visiting the
    branches heaviest first finds the heaviest leaves without building the rest of the tree.

    Returns:
        a sum of at most `rank` terms: fewer where the tensor has no more.
    """
    sizes, total = tensor.shape, float(tensor.norm())
    order = itertools.count()  # decides between equal weights
    queue: list[tuple[float, int, list[Tensor], Tensor]] = [(-total, next(order), [], tensor)]
    leaves: list[tuple[list[Tensor], Tensor]] = []
    while queue and len(leaves) < rank:
        weight, _, path, rest = heapq.heappop(queue)
        if -weight <= NUMERICALLY_ZERO * total:
            break
        if len(path) == len(sizes) - 1:
            leaves.append((path, rest.reshape(-1)))
            continue
        for vector, part in _split(rest.reshape(sizes[len(path)], -1), rank):
            heapq.heappush(queue, (-float(part.norm()), next(order), [*path, vector], part))
    if not leaves:
        return VectorSum(tensor.new_zeros(0), [tensor.new_zeros(n, 0) for n in sizes])
    last = torch.stack([rest for _, rest in leaves], dim=1)
    weight_kept = last.norm(dim=0)
    vectors = [torch.stack([path[mode] for path, _ in leaves], dim=1) for mode in range(len(sizes) - 1)]
    return VectorSum(weight_kept, [*vectors, last / weight_kept])


def _split(matrix: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """SVD of (n, m) as pairs (unit left vector, right vector carrying the weight), at most `rank`, heaviest first.

    Through the Gram matrix of the shorter side: right vectors computed as u^T M make the sum exact to rounding even
    where the squared singular values are not.
    """
    n, m = matrix.shape
    if n <= m:
        left = eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
        return list(zip(left.T, left.T @ matrix, strict=True))
    right = eigh(matrix.T @ matrix)[1].flip(1)[:, :rank]
    columns = matrix @ right
    pairs = []
    for column, vector in zip(columns.T, right.T, strict=True):
        norm = column.norm()
        if norm > 0:
            pairs.append((column / norm, vector * norm))
    return pairs


def higher_order_svd(tensor: Tensor, rank: int) -> VectorSum:
    """The `rank` heaviest terms of the HOSVD: an orthonormal basis per mode, the largest entries of the core.

    De Lathauwer, De Moor & Vandewalle, "A multilinear singular value decomposition" (2000).
    """
    sizes = tensor.shape
    bases, core = [], tensor
    for mode, size in enumerate(sizes):
        unfolded = tensor.movedim(mode, 0).reshape(size, -1)
        if size <= unfolded.shape[1]:
            basis = eigh(unfolded @ unfolded.T)[1].flip(1)
        else:
            basis = torch.linalg.svd(unfolded, full_matrices=True)[0]
        bases.append(basis)
        core = torch.tensordot(core, basis, dims=([0], [0]))  # the mode in front is consumed and appended at the end
    flat = core.reshape(-1)
    weight, place = flat.abs().topk(min(rank, flat.numel()))
    place = place[weight > 0]
    vectors = []
    remaining = place
    for mode in reversed(range(len(sizes))):
        vectors.append(bases[mode][:, remaining % sizes[mode]])
        remaining = remaining // sizes[mode]
    vectors.reverse()
    if len(place):
        vectors[0] = vectors[0] * flat[place].sign()
    return VectorSum(flat[place].abs(), vectors)
