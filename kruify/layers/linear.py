"""`KroneckerLinear`: an nn.Linear whose weight is a sum of Kronecker products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kruify.factors import Structure
from kruify.layers.computed import parameter
from kruify.layers.matrix import KroneckerMatrix, apply_weight


class KroneckerLinear(nn.Module):
    """y = W x + b as nn.Linear computes it: (..., in_features) -> (..., out_features).

    Args:
        structure: of W, (out_features, in_features); its low rank is two products of matrices.

    Attributes:
        weight: the `KroneckerMatrix`; `bias`: (out_features,), or None.
    """

    def __init__(
        self,
        structures: Sequence[Structure],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = KroneckerMatrix(structures, device, dtype)
        self.out_features, self.in_features = self.weight.shape
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        bias = parameter(self, "bias")
        if not is_low_rank(self.weight.structures):
            return apply_weight(self.weight, x, bias)
        left, right = self.weight.term_list()[0].held()[0]  # (1, rank, out_features, 1), (1, rank, 1, in_features)
        return F.linear(F.linear(x, right[0, :, 0]), left[0, :, :, 0].T, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def is_low_rank(structures: Sequence[Structure]) -> bool:
    """Whether a matrix is one sum of products of a column and a row, and nothing else."""
    (structure, *others) = structures
    shapes = [term.factors for term in structure.terms]
    low_rank = shapes == [((structure.rows, 1), (1, structure.cols))]
    return not others and low_rank and not (structure.scaled or structure.diagonal or structure.sparse_blocks)
