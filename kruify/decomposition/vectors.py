"""A sum of `rank` outer products of vectors, the form every product of factors has after the rearrangement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the heaviest term; lighter ones are rounding, and would only waste a factor.
NUMERICALLY_ZERO = 1e-14


@dataclass
class VectorSum:
    """sum_r weight[r] * vectors[0][:, r] o vectors[1][:, r] o ...

    Attributes:
        weight: (rank,), >= 0.
        vectors: one per mode, each (mode size, rank) with columns of norm 1; where the weight is 0, any columns.
    """

    weight: Tensor
    vectors: list[Tensor]

    @property
    def rank(self) -> int:
        return self.weight.shape[0]

    def to(self, dtype: torch.dtype) -> VectorSum:
        return VectorSum(self.weight.to(dtype), [v.to(dtype) for v in self.vectors])

    def dense(self) -> Tensor:
        """The tensor that the sum stands for, (mode 0, mode 1, ...)."""
        sizes = [v.shape[0] for v in self.vectors]
        if self.rank == 0:
            return self.weight.new_zeros(sizes)
        half = (len(sizes) + 1) // 2
        left = khatri_rao(self.vectors[:half]) * self.weight
        if half == len(sizes):
            return left.sum(dim=1).reshape(sizes)
        return (left @ khatri_rao(self.vectors[half:]).T).reshape(sizes)

    def gram(self) -> Tensor:  # (rank, rank)
        """Inner products of the weighted terms."""
        gram = self.weight[:, None] * self.weight
        for v in self.vectors:
            gram = gram * (v.T @ v)
        return gram

    def distance(self, tensor: Tensor) -> float:
        """||tensor - sum||_F^2."""
        return float((tensor - self.dense()).square().sum())

    def padded(self, rank: int) -> VectorSum:
        """The same sum with terms of weight 0 appended up to `rank`."""
        extra = rank - self.rank
        if extra <= 0:
            return self
        weight = torch.cat([self.weight, self.weight.new_zeros(extra)])
        return VectorSum(weight, [torch.cat([v, v.new_zeros(v.shape[0], extra)], dim=1) for v in self.vectors])


def khatri_rao(vectors: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product: (n_0, R), (n_1, R), ... -> (n_0 n_1 ..., R)."""
    product = vectors[0]
    for v in vectors[1:]:
        product = (product[:, None, :] * v[None, :, :]).reshape(-1, product.shape[1])
    return product


def normalised(vectors: Sequence[Tensor]) -> VectorSum:
    """Vectors of any length -> columns of norm 1 and their weights; a term with a zero column has weight 0."""
    norms = [v.norm(dim=0) for v in vectors]
    weight = torch.stack(norms).prod(dim=0)
    units = [v / n.where(n > 0, torch.ones_like(n)) for v, n in zip(vectors, norms, strict=True)]
    return VectorSum(weight, units)
